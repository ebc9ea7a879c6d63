# SPDX-License-Identifier: Apache-2.0
"""Cuts captioned videos into short pieces with the captions between, as lines of a sample file.

Training on clips (stage 1 of Keye-VL-2.0, arXiv 2606.10651) shows a video as pieces of at most
15 s, each followed by its caption. The file is not cut: a piece is a window of it.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_keye.errors import UserError
from megatron_keye.files.disk import remove, writing

_KEYS = {"video", "captions"}
_CAPTION_KEYS = {"start", "end", "caption"}
# So that 45.00000001 s are three pieces of 15 s, not four.
_SLACK_SECONDS = 1e-6


@dataclass(frozen=True, kw_only=True)
class Caption:
    """What happens in a stretch of a video."""

    start: float
    """Where it starts, in seconds."""
    end: float
    """Where it ends, in seconds; itself left out."""
    text: str
    """The caption."""

    @property
    def seconds(self) -> float:
        """Length of the stretch."""
        return self.end - self.start


@dataclass
class Counts:
    """What was written."""

    num_videos: int = 0
    num_samples: int = 0
    num_captions: int = 0
    num_pieces: int = 0
    longest_seconds: float = 0.0
    """Most seconds of video in one sample."""


def interleave_file(
    source: Path, out: Path, *, piece_seconds: float, sample_seconds: float
) -> Counts:
    """Write the samples of a file of captioned videos.

    Args:
        source: JSON lines {"video": FILE, "captions": [{"start", "end", "caption"}, ...]}, with
            times in seconds; FILE is relative to this file, absolute or a URL.
        out: Sample file to make; must not exist. Names in it are relative to it.
        piece_seconds: Longest piece.
        sample_seconds: Most video of one sample; a video with more becomes several samples. One
            caption is never divided between two.

    Returns:
        What was written.

    Raises:
        UserError: Naming file and line of what is malformed, or the file; nothing is left then.
    """
    if out.exists():
        raise UserError(f"--out: got {out}, which exists, expected a free name; remove it")
    counts = Counts()
    partial = out.with_name(f"{out.name}.partial")
    try:
        with writing(out, "samples"), partial.open("w", encoding="utf-8") as stream:
            for video, captions in _read(source):
                name = _relative(video, source.parent, out.parent)
                _write(stream, name, captions, counts, piece_seconds, sample_seconds)
            stream.flush()
            os.fsync(stream.fileno())
        if not counts.num_samples:
            raise UserError(f"{source}: holds no videos, expected one per line")
        with writing(out, "samples"):
            partial.rename(out)
    finally:
        remove(partial)
    return counts


def _write(
    stream: Any,
    video: str,
    captions: Sequence[Caption],
    counts: Counts,
    piece_seconds: float,
    sample_seconds: float,
) -> None:
    """Write the samples of one video, a line each."""
    counts.num_videos += 1
    for group in group_captions(captions, sample_seconds):
        stream.write(json.dumps(interleave(video, group, piece_seconds)) + "\n")
        counts.num_samples += 1
        counts.num_captions += len(group)
        counts.num_pieces += sum(len(cut(caption, piece_seconds)) for caption in group)
        seconds = sum(caption.seconds for caption in group)
        counts.longest_seconds = max(counts.longest_seconds, seconds)


def interleave(video: str, captions: Sequence[Caption], piece_seconds: float) -> dict[str, Any]:
    """Return a conversation in which each caption answers the pieces that it describes.

    Args:
        video: Name of the file.
        captions: In the order of their times.
        piece_seconds: Longest piece; a longer caption's stretch is shown in equal pieces.
    """
    messages = []
    for caption in captions:
        pieces = [
            {"type": "video", "video": video, "start": start, "end": end}
            for start, end in cut(caption, piece_seconds)
        ]
        messages.append({"role": "user", "content": pieces})
        messages.append({"role": "assistant", "content": caption.text})
    return {"messages": messages}


def cut(caption: Caption, piece_seconds: float) -> list[tuple[float, float]]:
    """Return start and end of the fewest equal pieces, each of at most `piece_seconds`."""
    num_pieces = max(1, math.ceil((caption.seconds - _SLACK_SECONDS) / piece_seconds))
    inner = [caption.start + caption.seconds * n / num_pieces for n in range(1, num_pieces)]
    bounds = [caption.start, *inner, caption.end]
    return list(zip(bounds, bounds[1:], strict=False))


def group_captions(captions: Sequence[Caption], sample_seconds: float) -> list[list[Caption]]:
    """Return neighbouring captions by sample: as many as `sample_seconds` hold, at least one."""
    groups: list[list[Caption]] = []
    left = 0.0
    for caption in captions:
        if not groups or caption.seconds > left + _SLACK_SECONDS:
            groups.append([])
            left = sample_seconds
        groups[-1].append(caption)
        left -= caption.seconds
    return groups


def _read(source: Path) -> Iterator[tuple[str, list[Caption]]]:
    """Yield the video's name and the captions, in the order of their times, of each line."""
    try:
        with source.open(encoding="utf-8-sig") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield _parse(line, f"{source}:{number}")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: cannot be read as UTF-8 JSON lines ({error})") from error


def _parse(line: str, where: str) -> tuple[str, list[Caption]]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is not valid JSON ({error}); one object per line") from error
    if not isinstance(record, dict) or record.keys() != _KEYS:
        got = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise UserError(f"{where}: got {got}, expected an object with {sorted(_KEYS)}")
    video, raw = record["video"], record["captions"]
    if not isinstance(video, str) or not video:
        raise UserError(f"{where}: 'video': got {video!r}, expected the name of a file")
    if not isinstance(raw, list) or not raw:
        raise UserError(f"{where}: 'captions': got {raw!r}, expected a list of at least one")
    captions = [_caption(each, where) for each in raw]
    return video, sorted(captions, key=lambda caption: (caption.start, caption.end))


def _caption(raw: Any, where: str) -> Caption:
    if not isinstance(raw, dict) or raw.keys() != _CAPTION_KEYS:
        raise UserError(f"{where}: got caption {raw!r}, expected {sorted(_CAPTION_KEYS)}")
    start, end, text = raw["start"], raw["end"], raw["caption"]
    are_numbers = type(start) in (int, float) and type(end) in (int, float)
    if not are_numbers or not 0 <= start < end < math.inf:
        raise UserError(
            f"{where}: got a caption from {start!r} to {end!r}, expected seconds, 0 or more, the "
            "end after the start"
        )
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: got caption {text!r}, expected text")
    return Caption(start=start, end=end, text=text)


def _relative(video: str, base: Path, folder: Path) -> str:
    """Return a media name that starts from `folder` in place of `base`."""
    if "://" in video or Path(video).is_absolute():
        return video
    return os.path.relpath(base / video, folder)
