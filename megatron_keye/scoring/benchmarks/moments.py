# SPDX-License-Identifier: Apache-2.0
"""Sentences about moments of videos, which are to be found: Charades-STA and its like.

Source: Gao et al., arXiv 1705.02101 (Charades-STA); Krishna et al., arXiv 1705.00754 (ActivityNet
Captions); Lei et al., arXiv 2107.09609 (QVHighlights).
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_keye.data.conversation.values import shown, text
from megatron_keye.errors import UserError
from megatron_keye.scoring.benchmarks.fields import field
from megatron_keye.scoring.intervals import Interval
from megatron_keye.scoring.question import Question, read_id, read_seconds, user_turn
from megatron_keye.scoring.truth import GroundingTruth, read_interval

CHARADES_LINE = re.compile(r"(?P<video>\S+) (?P<start>[\d.]+) (?P<end>[\d.]+)\s*##(?P<query>.+)")
"""Line of Charades-STA: a video, start, end, and a sentence."""
ROW_KEYS = {"video", "caption", "timestamp"}
"""Keys of a row of Charades-STA in parquet, which has no id."""
VIDEO_KEYS = {"duration", "timestamps", "sentences"}
"""Keys of a video in ActivityNet Captions."""
HIGHLIGHT_KEYS = {"qid", "query", "vid", "duration", "relevant_windows"}
"""Keys of a query of QVHighlights."""


def read_charades(line: str, name: str) -> Question:
    """Return the question of a line of Charades-STA, whose videos' lengths are not known.

    Args:
        line: The line.
        name: Id of the question.

    Raises:
        UserError: For any other line.
    """
    match = CHARADES_LINE.fullmatch(line.strip())
    if match is None:
        raise UserError(f"got {shown(line.strip())}, expected VIDEO START END##SENTENCE")
    try:
        bounds = [float(match["start"]), float(match["end"])]
    except ValueError as error:
        raise UserError(f"got {shown(line.strip())}, expected seconds ({error})") from error
    return _question(name, match["video"], match["query"], [bounds], None)


def read_row(record: Mapping[str, Any]) -> Iterator[Question]:
    """Yield the question of a row of Charades-STA in parquet.

    Raises:
        UserError: For values that are none of its.
    """
    video = text(field(record, "video"), "'video'").removesuffix(".mp4")
    yield _question("", video, field(record, "caption"), [field(record, "timestamp")], None)


def read_video(name: str, record: Mapping[str, Any]) -> Iterator[Question]:
    """Yield a question for each sentence about a video of ActivityNet Captions.

    Raises:
        UserError: For values that are none of its.
    """
    times, sentences = field(record, "timestamps"), field(record, "sentences")
    is_paired = isinstance(times, list) and isinstance(sentences, list)
    if not is_paired or len(times) != len(sentences):
        raise UserError("'timestamps' and 'sentences': expected two lists of one length")
    seconds = field(record, "duration")
    for place, (bounds, sentence) in enumerate(zip(times, sentences, strict=True)):
        yield _question(f"{name}-{place}", name, sentence, [bounds], seconds)


def read_highlights(record: Mapping[str, Any]) -> Iterator[Question]:
    """Yield the question of a query of QVHighlights, whose moment may be in several stretches.

    Raises:
        UserError: For values that are none of its.
    """
    windows = field(record, "relevant_windows")
    if not isinstance(windows, list):
        raise UserError(f"'relevant_windows': got {shown(windows)}, expected a list of pairs")
    name = text(field(record, "vid"), "'vid'")
    name_of_query = read_id(field(record, "qid"))
    yield _question(
        name_of_query, name, field(record, "query"), windows, field(record, "duration")
    )


def _question(name: str, video: str, query: Any, windows: list[Any], seconds: Any) -> Question:
    length = None if seconds is None else read_seconds(seconds, "'duration'")
    intervals = tuple(_interval(window, length) for window in windows)
    sentence = text(query, "query").strip().rstrip(".")
    asked = f'When does this happen: "{sentence}"? Answer with start and end in seconds.'
    return Question(
        id=name,
        task="grounding",
        messages=user_turn(f"{video}.mp4", asked),
        truth=GroundingTruth(intervals=intervals),
        seconds=length,
    )


def _interval(window: Any, seconds: float | None) -> Interval:
    """Return a stretch; the benchmarks' own may end a little after the video, or be reversed."""
    if (
        isinstance(window, list)
        and len(window) == 2
        and all(type(bound) in (int, float) for bound in window)
    ):
        window = sorted(window)
    start, end = read_interval(window)
    return (start, end) if seconds is None else (min(start, seconds), min(end, seconds))
