# SPDX-License-Identifier: Apache-2.0
"""What a forged clip shows and when: shapes that come, go, blink, move and change colour.

Times are numbers of frames, so that what is on the screen is known exactly whatever the rate; the
times of the written file make seconds of them.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np

FORMS = ("circle", "square", "triangle")
COLOURS = {
    "red": (220, 20, 20),
    "green": (20, 180, 20),
    "blue": (20, 20, 220),
    "yellow": (230, 220, 20),
    "purple": (150, 20, 170),
    "cyan": (20, 210, 220),
    "white": (245, 245, 245),
    "black": (10, 10, 10),
}
WORDS = ("NORTH", "SOUTH", "LEMON", "RIVER", "CLOUD", "STONE")
LETTERS = "ABCDEFGH"
MOST_SHAPES = 5
BLINK_SHARE = 0.35
"""How likely a shape blinks, unless a caller says otherwise."""
SHAPE_NAMES = tuple(f"{colour} {form}" for colour, form in itertools.product(COLOURS, FORMS))
"""Every shape there is, by colour and form."""
_MOST_BLINKS = 4

Frames = tuple[int, int]
"""First frame, and the one after the last."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A coloured shape; no two of a clip have one form and colour."""

    form: str
    """Of FORMS."""
    colour: str
    """Of COLOURS."""
    letter: str
    """Written on it."""
    shown: tuple[Frames, ...]
    """When it is on the screen; several stretches where it blinks."""
    moves: Frames | None = None
    """When it moves, which it does within a stretch."""
    turns: tuple[int, str] | None = None
    """The frame from which it has another colour, and which."""

    @property
    def name(self) -> str:
        """Colour and form in words."""
        return f"{self.colour} {self.form}"

    def colour_at(self, frame: int) -> str:
        """Return its colour in a frame."""
        return self.turns[1] if self.turns and frame >= self.turns[0] else self.colour

    def is_shown(self, frame: int) -> bool:
        """Return whether it is on the screen in a frame."""
        return any(start <= frame < stop for start, stop in self.shown)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """All that a clip shows, noise apart."""

    num_frames: int
    """Frames of the clip."""
    shapes: tuple[Shape, ...]
    """In their places on the screen, from left to right and down."""
    word: str = ""
    """Text that is shown, "" for none."""
    word_shown: Frames = (0, 0)
    """When it is shown."""


def draw_scene(
    generator: np.random.Generator,
    num_frames: int,
    *,
    most_shapes: int,
    frames_per_second: float,
    longest_stay: float = math.inf,
    word_share: float = 0.5,
    blink_share: float = BLINK_SHARE,
) -> Scene:
    """Draw a scene.

    Args:
        generator: Decides everything.
        num_frames: Frames of the clip, at least 6.
        most_shapes: Most shapes; one at least is drawn.
        frames_per_second: Whatever comes or goes stays so for about a second or longer.
        longest_stay: Most seconds for which a shape or a word stays at once.
        word_share: How likely a word is shown.
        blink_share: How likely a shape vanishes and comes back, where the clip is long enough.
    """
    shortest = max(1, min(round(frames_per_second), num_frames // 6))
    longest = int(max(shortest, min(num_frames, longest_stay * frames_per_second)))
    num_shapes = int(generator.integers(1, most_shapes + 1))
    # Two colours of each form are set aside for each shape, one to turn into.
    names = [SHAPE_NAMES[place] for place in generator.permutation(len(SHAPE_NAMES))]
    letters = generator.permutation(list(LETTERS)).tolist()
    shapes = []
    for number in range(num_shapes):
        colour, form = names.pop(0).split()
        other = next((name for name in names if name.endswith(form)), None)
        life = _draw_life(generator, num_frames, shortest, longest, blink_share)
        turns = None
        if other is not None and len(life) == 1 and generator.random() < 0.3:
            names.remove(other)
            turns = (_inside(generator, life[0], shortest), other.split()[0])
        moves = None
        if turns is None and len(life) == 1 and generator.random() < 0.4:
            moves = _part(generator, life[0], shortest)
        shapes.append(
            Shape(
                form=form,
                colour=colour,
                letter=letters[number],
                shown=life,
                moves=moves,
                turns=turns,
            )
        )
    if generator.random() >= word_share:
        return Scene(num_frames=num_frames, shapes=tuple(shapes))
    word = WORDS[generator.integers(len(WORDS))]
    [shown] = _cut(generator, num_frames, 1, shortest, longest)
    return Scene(num_frames=num_frames, shapes=tuple(shapes), word=word, word_shown=shown)


def _draw_life(
    generator: np.random.Generator,
    num_frames: int,
    shortest: int,
    longest: int,
    blink_share: float,
) -> tuple[Frames, ...]:
    """Return the stretches in which a shape is shown: one, or one more than its blinks."""
    most = min(_MOST_BLINKS, (num_frames // shortest - 1) // 2 - 1)
    num_blinks = int(generator.integers(1, most + 1)) if most > 0 else 0
    num_stretches = 1 + num_blinks * (generator.random() < blink_share)
    return _cut(generator, num_frames, num_stretches, shortest, longest)


def _cut(
    generator: np.random.Generator,
    num_frames: int,
    num_stretches: int,
    shortest: int,
    longest: int,
) -> tuple[Frames, ...]:
    """Draw stretches that are, like the gaps between, at least `shortest` frames long.

    None is longer than `longest`; of one that would be, a part is taken.
    """
    num_parts = 2 * num_stretches - 1
    spare = num_frames - num_parts * shortest
    cuts = np.sort(generator.integers(0, spare + 1, num_parts + 1))
    bounds = (cuts + shortest * np.arange(num_parts + 1)).tolist()
    stretches = zip(bounds[::2], bounds[1::2], strict=True)
    return tuple(
        each if each[1] - each[0] <= longest else _short_part(generator, each, shortest, longest)
        for each in stretches
    )


def _short_part(
    generator: np.random.Generator, stretch: Frames, shortest: int, longest: int
) -> Frames:
    """Draw a part of a stretch of `shortest` to `longest` frames, every length equally often."""
    length = int(generator.integers(shortest, longest + 1))
    start = int(generator.integers(stretch[0], stretch[1] - length + 1))
    return start, start + length


def _inside(generator: np.random.Generator, stretch: Frames, shortest: int) -> int:
    """Draw a frame within a stretch, in its middle if it is too short to keep a distance."""
    low, high = stretch[0] + shortest, stretch[1] - shortest
    return int(generator.integers(low, high + 1)) if low <= high else sum(stretch) // 2


def _part(generator: np.random.Generator, stretch: Frames, shortest: int) -> Frames:
    """Draw a part of a stretch of at least `shortest` frames."""
    start = int(generator.integers(stretch[0], stretch[1] - shortest + 1))
    return start, int(generator.integers(start + shortest, stretch[1] + 1))
