# SPDX-License-Identifier: Apache-2.0
"""Draws the frames of a forged clip."""

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from megatron_keye.production.forged.scene import COLOURS, Scene, Shape

_BACKGROUND = (128, 128, 128)
_SWAY = 0.06
"""Most shift of the picture, as a share of its side."""
_NOISE = 6.0
"""Standard deviation, of 255."""
LEGIBLE_RADIUS = 12
"""Least radius in pixels of a shape with a letter on it."""


def shape_radius(size: tuple[int, int], num_shapes: int) -> float:
    """Return half the side of each of so many shapes, in pixels."""
    return 0.3 * min(_cell(size, num_shapes))


def _cell(size: tuple[int, int], num_shapes: int) -> tuple[float, float]:
    """Return width and height of a shape's cell."""
    across = math.ceil(math.sqrt(num_shapes))
    return size[0] / across, size[1] / math.ceil(num_shapes / across)


def draw_frames(
    scene: Scene, size: tuple[int, int], generator: np.random.Generator | None
) -> Iterator[NDArray[np.uint8]]:
    """Yield the frames of a scene, uint8 [height, width, 3].

    Args:
        scene: What is shown.
        size: Pixels across and down.
        generator: Draws noise and sways the picture; None leaves both out.
    """
    period, phase = (
        (generator.uniform(20, 80), generator.uniform(0, 2 * math.pi)) if generator else (1.0, 0.0)
    )
    # One field of noise, put elsewhere in each frame: drawing it anew would take most of the time.
    field = generator.normal(0.0, _NOISE, (size[1], size[0], 3)) if generator else None
    for frame in range(scene.num_frames):
        image = Image.new("RGB", size, _BACKGROUND)
        angle = phase + 2 * math.pi * frame / period
        shift = (_SWAY * math.sin(angle), _SWAY * math.cos(angle)) if generator else (0.0, 0.0)
        for place, shape in enumerate(scene.shapes):
            if shape.is_shown(frame):
                _draw_shape(image, shape, frame, place, len(scene.shapes), shift)
        if scene.word and scene.word_shown[0] <= frame < scene.word_shown[1]:
            _draw_word(image, scene.word)
        pixels = np.asarray(image)
        if generator is not None and field is not None:
            noise = np.roll(field, generator.integers(size).tolist(), axis=(1, 0))
            pixels = (pixels + noise).clip(0, 255).astype(np.uint8)
        yield pixels


def _draw_shape(
    image: Image.Image,
    shape: Shape,
    frame: int,
    place: int,
    num_shapes: int,
    shift: tuple[float, float],
) -> None:
    """Draw one shape into its cell of a square of cells, so that none hides another."""
    across = math.ceil(math.sqrt(num_shapes))
    cell, radius = _cell(image.size, num_shapes), shape_radius(image.size, num_shapes)
    x = (place % across + 0.5 + shift[0] + _moved(shape, frame)) * cell[0]
    y = (place // across + 0.5 + shift[1]) * cell[1]
    box = (x - radius, y - radius, x + radius, y + radius)
    colour = COLOURS[shape.colour_at(frame)]
    draw = ImageDraw.Draw(image)
    if shape.form == "circle":
        draw.ellipse(box, fill=colour)
    elif shape.form == "square":
        draw.rectangle(box, fill=colour)
    else:
        draw.polygon([(x, box[1]), (box[0], box[3]), (box[2], box[3])], fill=colour)
    if radius >= LEGIBLE_RADIUS:
        ink = "black" if sum(colour) > 380 else "white"
        font = ImageFont.load_default(radius)
        draw.text((x, y + 0.15 * radius), shape.letter, fill=ink, font=font, anchor="mm")


def _moved(shape: Shape, frame: int) -> float:
    """Return how far a shape has moved to the right, as a share of its cell."""
    if shape.moves is None:
        return 0.0
    start, stop = shape.moves
    done = min(1.0, max(0.0, (frame - start + 1) / (stop - start)))
    return 0.3 * done - 0.15


def _draw_word(image: Image.Image, word: str) -> None:
    font = ImageFont.load_default(max(8.0, image.height / 12))
    draw = ImageDraw.Draw(image)
    draw.text((image.width / 2, 2), word, fill="white", font=font, anchor="mt")
