"""A contact sheet of prepared samples: frames as the model sees them, and the exact text.

For a person to check before a long run; the whole text also goes to a file beside it, since
Pillow's built-in font has Latin letters only.
"""

import textwrap
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from megatron_keye.config import DataConfig, ModelConfig
from megatron_keye.data.row import Picture, Sample
from megatron_keye.data.store.reader import SampleStore
from megatron_keye.data.store.settings import deciding_settings
from megatron_keye.data.tokens import Tokenizer, load_tokenizer
from megatron_keye.data.video.image import decode_image
from megatron_keye.data.video.pyav import iterate_frames

MAX_PICTURES = 12
"""Pictures shown of one sample, evenly spread over it."""
_MAX_LINES = 40
_COLUMNS = 4
_CELL = (176, 132)
_LINE_HEIGHT = 15
_CHARACTERS_PER_LINE = 110
_MARGIN = 12
_WIDTH = 1600


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
    texts = [abbreviated_text(sample, tokenizer, model) for sample in samples]
    side = model.vision.patch_size
    sheets = [_sheet(sample, text, side) for sample, text in zip(samples, texts, strict=True)]
    whole = Image.new("RGB", (_WIDTH, sum(sheet.height for sheet in sheets)), "white")
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    whole.save(store.with_name(f"{store.name}.preview.png"))
    store.with_name(f"{store.name}.preview.txt").write_text(
        "\n".join(f"{_title(s)}\n{text}\n" for s, text in zip(samples, texts, strict=True)),
        encoding="utf-8",
    )


def abbreviated_text(sample: Sample, tokenizer: Tokenizer, model: ModelConfig) -> str:
    """Return the text that the model sees, with runs of placeholders as `<|video_pad|>x128`."""
    parts = []
    for key, run in groupby(
        sample.token_ids.tolist(), lambda token: token if token in model.vision_token_ids else -1
    ):
        token_ids = list(run)
        is_long = key >= 0 and len(token_ids) > 1
        text = tokenizer.decode(token_ids[:1] if is_long else token_ids)
        parts.append(f"{text}x{len(token_ids)}" if is_long else text)
    return "".join(parts)


def _title(sample: Sample) -> str:
    num_predicted = int((sample.labels >= 0).sum())
    return (
        f"{sample.name}: {len(sample.token_ids):,} tokens, {num_predicted:,} predicted, "
        f"{len(sample.pictures):,} images and frames"
    )


def _sheet(sample: Sample, text: str, patch_size: int) -> Image.Image:
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
    for index, thumbnail in _thumbnails(pictures, patch_size).items():
        left = _MARGIN + index % _COLUMNS * (_CELL[0] + _MARGIN)
        top = first_row + index // _COLUMNS * cell_height
        sheet.paste(thumbnail, (left, top))
        label = _label(pictures[index], patch_size)
        draw.text((left, top + thumbnail.height + 1), label, fill="black", font=font)
    left = _MARGIN + min(len(pictures), _COLUMNS) * (_CELL[0] + _MARGIN)
    for number, line in enumerate(lines):
        draw.text((left, first_row + number * _LINE_HEIGHT), line, fill="black", font=font)
    return sheet


def _label(picture: Picture, patch_size: int) -> str:
    size = f"{picture.patch_grid[1] * patch_size} x {picture.patch_grid[0] * patch_size}"
    if picture.seconds is None:
        return f"image, {size}"
    return f"{picture.seconds:.2f} s, frame {picture.frame}, {size}"


def _thumbnails(pictures: list[Picture], patch_size: int) -> dict[int, Image.Image]:
    """Return a thumbnail of each picture by its index, resized to its patch grid first."""
    found: dict[int, Image.Image] = {}
    for medium in {picture.medium for picture in pictures}:
        path = Path(medium.path)
        indices = [n for n, p in enumerate(pictures) if p.medium == medium]
        wanted = {pictures[index].frame for index in indices}
        frames = (
            iterate_frames(path, wanted) if medium.kind == "video" else [(0, decode_image(path))]
        )
        for frame, pixels in frames:
            for index in indices:
                if pictures[index].frame == frame:
                    down, across = pictures[index].patch_grid
                    seen = (across * patch_size, down * patch_size)
                    found[index] = Image.fromarray(pixels).resize(seen, Image.Resampling.BICUBIC)
                    found[index].thumbnail(_CELL)
    return found


def _wrapped(text: str) -> list[str]:
    """Break text into lines for the sheet, as many as fit; the text file has them all."""
    lines = [
        part
        for line in text.splitlines()
        for part in textwrap.wrap(line, _CHARACTERS_PER_LINE, break_on_hyphens=False) or [""]
    ]
    if len(lines) <= _MAX_LINES:
        return lines
    return [
        *lines[: _MAX_LINES - 1],
        f"... {len(lines) - _MAX_LINES + 1} more lines in the .txt",
    ]
