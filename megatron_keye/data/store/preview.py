# SPDX-License-Identifier: Apache-2.0
"""A contact sheet of prepared samples: frames as the model sees them, and the exact text.

What is predicted is blue in the sheet and bracketed in the text, with its weight. For a person to
check before a long run; the whole text also goes to a file beside it, since Pillow's built-in font
has Latin letters only.
"""

import re
import textwrap
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from megatron_keye.config import DataConfig, ModelConfig, RemoteConfig
from megatron_keye.config.data import LossWeighting
from megatron_keye.data.conversation import describe_unread
from megatron_keye.data.remote.copies import local_copy
from megatron_keye.data.row import Picture, Sample
from megatron_keye.data.store.reader import SampleStore
from megatron_keye.data.store.settings import deciding_settings
from megatron_keye.data.tokens import Tokenizer, load_tokenizer
from megatron_keye.data.video.image import decode_image
from megatron_keye.data.video.pyav import iterate_frames
from megatron_keye.data.weighting import loss_weights
from megatron_keye.files.disk import writing

MAX_PICTURES = 12
"""Pictures shown of one sample, evenly spread over it."""
_MAX_LINES = 40
_COLUMNS = 4
_CELL = (176, 132)
_LINE_HEIGHT = 15
_CHARACTERS_PER_LINE = 110
_MARGIN = 12
_WIDTH = 1600
_PREDICTED = "\u27e6", "\u27e7"
"""Brackets around predicted text, which hardly any text has."""
_COLORS = {False: "black", True: "blue"}
_LEGEND = (
    f"Text between {_PREDICTED[0]} and {_PREDICTED[1]} is predicted; where a label of it does not "
    "weigh 1, its weight stands in front."
)


def write_preview(store: Path, config: DataConfig, model: ModelConfig, count: int) -> None:
    """Write STORE.preview.png and STORE.preview.txt.

    Args:
        store: A finished store.
        config: Settings that it was prepared with.
        model: Sizes and placeholders, likewise.
        count: Samples to show, evenly spread over the store.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    source = SampleStore(store, deciding_settings(tokenizer, config, model))
    spread = np.linspace(0, source.num_samples - 1, min(count, source.num_samples))
    samples = source.load(spread.round().astype(int).tolist())
    texts = [
        marked_text(sample, tokenizer, model, weighting=config.loss_weighting)
        for sample in samples
    ]
    side, remote = model.vision.patch_size, config.remote
    sheets = [
        _sheet(sample, text, side, remote) for sample, text in zip(samples, texts, strict=True)
    ]
    whole = Image.new("RGB", (_WIDTH, sum(sheet.height for sheet in sheets)), "white")
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    with writing(store.parent, "a preview"):
        whole.save(store.with_name(f"{store.name}.preview.png"))
        store.with_name(f"{store.name}.preview.txt").write_text(
            "\n".join(
                [
                    _LEGEND,
                    *([unread] if (unread := describe_unread(source.unread)) else []),
                    *(f"\n{_title(s)}\n{text}" for s, text in zip(samples, texts, strict=True)),
                    "",
                ]
            ),
            encoding="utf-8",
        )


def marked_text(
    sample: Sample,
    tokenizer: Tokenizer,
    model: ModelConfig,
    *,
    weighting: LossWeighting = "token",
) -> str:
    """Return the text that the model sees, what is predicted in brackets.

    Runs of placeholders are shortened to `<|video_pad|>x128`.

    Args:
        sample: What to show.
        tokenizer: Its vocabulary.
        model: Ids of placeholders.
        weighting: As in `data.loss_weighting`; decides the weights that are shown.
    """
    # A token is predicted at the position before it.
    weights = [0.0, *loss_weights(sample.weights, weighting)[:-1].tolist()]
    parts = []
    for weight, run in groupby(
        zip(sample.token_ids.tolist(), weights, strict=True), lambda x: x[1]
    ):
        text = _abbreviated([token for token, _ in run], tokenizer, model)
        shown = text if weight in (0, 1) else f"{weight:.3g}: {text}"
        parts.append(f"{_PREDICTED[0]}{shown}{_PREDICTED[1]}" if weight else shown)
    return "".join(parts)


def _abbreviated(token_ids: list[int], tokenizer: Tokenizer, model: ModelConfig) -> str:
    parts = []
    for key, group in groupby(
        token_ids, lambda token: token if token in model.vision_token_ids else -1
    ):
        run = list(group)
        is_long = key >= 0 and len(run) > 1
        text = tokenizer.decode(run[:1] if is_long else run)
        parts.append(f"{text}x{len(run)}" if is_long else text)
    return "".join(parts)


def _title(sample: Sample) -> str:
    num_predicted = int((sample.labels >= 0).sum())
    return (
        f"{sample.name}: {len(sample.token_ids):,} tokens, {num_predicted:,} predicted (blue), "
        f"{len(sample.pictures):,} images and frames"
    )


def _sheet(sample: Sample, text: str, patch_size: int, remote: RemoteConfig) -> Image.Image:
    """Draw one sample: pictures on the left, text on the right."""
    chosen = np.linspace(0, len(sample.pictures) - 1, min(MAX_PICTURES, len(sample.pictures)))
    pictures = [sample.pictures[index] for index in chosen.round().astype(int)]
    lines = _wrapped(text)
    num_rows = -(-len(pictures) // _COLUMNS)
    cell_height = _CELL[1] + 2 * _LINE_HEIGHT
    height = max(num_rows * cell_height, len(lines) * _LINE_HEIGHT) + 2 * _LINE_HEIGHT
    sheet = Image.new("RGB", (_WIDTH, height + 2 * _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=12)
    draw.line((0, 0, _WIDTH, 0), fill="black")
    title = _title(sample)
    if len(pictures) < len(sample.pictures):
        title += f", {len(pictures)} of them shown"
    draw.text((_MARGIN, _MARGIN), title, fill="black", font=font)
    first_row = _MARGIN + 2 * _LINE_HEIGHT
    for index, thumbnail in _thumbnails(pictures, patch_size, remote).items():
        left = _MARGIN + index % _COLUMNS * (_CELL[0] + _MARGIN)
        top = first_row + index // _COLUMNS * cell_height
        sheet.paste(thumbnail, (left, top))
        label = _label(pictures[index], patch_size)
        draw.text((left, top + thumbnail.height + 1), label, fill="black", font=font)
    left = _MARGIN + min(len(pictures), _COLUMNS) * (_CELL[0] + _MARGIN)
    for number, line in enumerate(lines):
        place, top = float(left), first_row + number * _LINE_HEIGHT
        for text, is_predicted in line:
            draw.text((place, top), text, fill=_COLORS[is_predicted], font=font)
            place += font.getlength(text)
    return sheet


def _label(picture: Picture, patch_size: int) -> str:
    size = f"{picture.patch_grid[1] * patch_size} x {picture.patch_grid[0] * patch_size}"
    if picture.seconds is None:
        return f"image, {size}"
    is_file = picture.medium.kind == "image"
    frame = Path(picture.medium.path).name if is_file else f"frame {picture.frame}"
    return f"{picture.seconds:.2f} s, {frame}, {size}"


def _thumbnails(
    pictures: list[Picture], patch_size: int, remote: RemoteConfig
) -> dict[int, Image.Image]:
    """Return a thumbnail of each picture by its index, resized to its patch grid first."""
    found: dict[int, Image.Image] = {}
    for medium in {picture.medium for picture in pictures}:
        indices = [n for n, p in enumerate(pictures) if p.medium == medium]
        wanted = {pictures[index].frame for index in indices}
        with local_copy(medium, remote) as path:
            is_video = medium.kind == "video"
            frames = iterate_frames(path, wanted) if is_video else [(0, decode_image(path))]
            for frame, pixels in frames:
                for index in indices:
                    if pictures[index].frame == frame:
                        down, across = pictures[index].patch_grid
                        seen = (across * patch_size, down * patch_size)
                        whole = Image.fromarray(pixels)
                        found[index] = whole.resize(seen, Image.Resampling.BICUBIC)
                        found[index].thumbnail(_CELL)
    return found


def _wrapped(text: str) -> list[list[tuple[str, bool]]]:
    """Break text into lines for the sheet, of pieces that are predicted or not.

    Of more lines than fit the middle is left out; the text file has them all.
    """
    wrapped = [
        part
        for line in text.splitlines()
        for part in textwrap.wrap(line, _CHARACTERS_PER_LINE, break_on_hyphens=False) or [""]
    ]
    lines: list[list[tuple[str, bool]]] = []
    is_predicted = False
    for line in wrapped:
        lines.append([])
        for piece in re.split(f"([{''.join(_PREDICTED)}])", line):
            if piece in _PREDICTED:
                is_predicted = piece == _PREDICTED[0]
            elif piece:
                lines[-1].append((piece, is_predicted))
    num_more = len(lines) - _MAX_LINES + 1
    if num_more <= 1:
        return lines
    first = _MAX_LINES // 2
    note = [(f"... {num_more} more lines in the .txt", False)]
    return [*lines[:first], note, *lines[first + num_more :]]
