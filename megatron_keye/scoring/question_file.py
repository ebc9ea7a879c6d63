# SPDX-License-Identifier: Apache-2.0
"""Reads the questions of a file: of this project's form, or of a public benchmark's.

The form is known by the keys of each record; what has the keys of none is refused.
"""

import csv
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_keye.data.conversation.media import LIST_KEYS
from megatron_keye.data.conversation.values import shown
from megatron_keye.errors import UserError
from megatron_keye.scoring.benchmarks import (
    candidates,
    long_video_bench,
    moments,
    next_qa,
    temp_compass,
    video_mme,
)
from megatron_keye.scoring.question import KEYS, Question, read_question
from megatron_keye.scoring.record_file import Record, read_records

_MEDIA_LISTS = tuple(key for keys in LIST_KEYS.values() for key in keys)
_FORMS: dict[str, tuple[set[str], Callable[[Mapping[str, Any]], Iterator[Question]]]] = {
    "Video-MME": (video_mme.KEYS, video_mme.read),
    "Video-MME's sheet of answers": (video_mme.SHEET_KEYS, video_mme.read),
    "LongVideoBench": (long_video_bench.KEYS, long_video_bench.read),
    "LongVideoBench's table": (long_video_bench.TABLE_KEYS, long_video_bench.read),
    "MLVU and MVBench": (candidates.KEYS, candidates.read),
    "TempCompass": (temp_compass.KEYS, temp_compass.read),
    "NExT-QA": (next_qa.KEYS, next_qa.read),
    "NExT-GQA": (next_qa.GROUNDED_KEYS, next_qa.read),
    "QVHighlights": (moments.HIGHLIGHT_KEYS, moments.read_highlights),
    "Charades-STA's table": (moments.ROW_KEYS, moments.read_row),
}
"""Keys and reader of each public form of one object a line, list or row."""


def read_questions(path: Path, videos: Path | None = None) -> list[Question]:
    """Return the questions of a file in order.

    Args:
        path: JSON lines, a JSON list or parquet of this project's form, Video-MME's,
            LongVideoBench's, MLVU's, MVBench's, TempCompass', NExT-QA's, NExT-GQA's, QVHighlights'
            or Charades-STA's; CSV (.csv) of NExT-QA or NExT-GQA; a JSON object of ActivityNet
            Captions or TempCompass; or lines of Charades-STA (.txt).
        videos: Folder in which the videos of a public benchmark are; None for that of the file.

    Raises:
        UserError: Naming the line of a malformed question, or one of an unknown form; or two of
            one id.
    """
    questions = list(_read(path, videos or path.parent))
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise UserError(f"{path}: has two questions of the id {question.id!r}, expected one")
        seen.add(question.id)
    if not questions:
        raise UserError(f"{path}: holds no questions, expected at least one")
    return questions


def with_media_from(question: Question, base: Path, folder: Path) -> Question:
    """Return a question whose media are named from another folder.

    Args:
        question: As it was read.
        base: Folder that its relative names start from.
        folder: Folder that they shall start from.

    Raises:
        UserError: For media that are listed beside the text, where marks show their places.
    """
    listed = [
        key
        for key in _MEDIA_LISTS
        for part in (question.others, *question.messages)
        if key in part
    ]
    if listed:
        raise UserError(
            f"question {question.id!r}: has {listed[0]!r}, expected media in the content of the "
            'turn, as {"type": "video", "video": NAME}; or generate first and give --answers'
        )
    turns = [
        turn | {"content": [_moved(part, base, folder) for part in turn["content"]]}
        if isinstance(turn.get("content"), list)
        else turn
        for turn in question.messages
    ]
    return replace(question, messages=tuple(turns))


def _moved(part: Any, base: Path, folder: Path) -> Any:
    kind = part.get("type") if isinstance(part, dict) else None
    name = part.get(kind) if kind in ("video", "image") else None
    if not isinstance(name, str) or "://" in name or Path(name).is_absolute():
        return part
    return part | {kind: os.path.relpath(base / name, folder)}


def _read(path: Path, videos: Path) -> Iterator[Question]:
    if path.suffix == ".txt":
        yield from _from(videos, path, _read_charades(path))
    elif path.suffix == ".json" and (by_video := _object(path)) is not None:
        yield from _from(videos, path, _read_videos(path, by_video))
    else:
        for record in _read_table(path) if path.suffix == ".csv" else read_records(path):
            if record.value.keys() >= KEYS:
                yield read_question(record.value, record.name, record.line)
            else:
                yield from _from(videos, path, _read_public(record))


def _from(videos: Path, path: Path, questions: Iterator[Question]) -> Iterator[Question]:
    """Yield questions of a benchmark, with media named from the folder of its file."""
    for question in questions:
        yield with_media_from(question, videos, path.parent)


def _read_public(record: Record) -> Iterator[Question]:
    readers = [read for keys, read in _FORMS.values() if record.value.keys() >= keys]
    if len(readers) != 1:
        raise UserError(
            f"{record.name}: got an object with {shown(sorted(record.value))}, expected "
            f"{sorted(KEYS)}, or the keys of {', '.join(_FORMS)}"
        )
    with _naming(record.name):
        for question in readers[0](record.value):
            yield replace(question, id=question.id or str(record.line))


def _read_table(path: Path) -> Iterator[Record]:
    """Yield the rows of a CSV file, whose values are text."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            for number, row in enumerate(csv.DictReader(stream, strict=True), start=1):
                # Values without a column, and columns without a value.
                if None in row or None in row.values():
                    raise UserError(
                        f"{path}:{number}: got {shown(list(row.values()))}, expected a value for "
                        "each column"
                    )
                yield Record(name=f"{path}:{number}", line=number, value=dict(row))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as CSV ({error}); correct it") from error


def _read_charades(path: Path) -> Iterator[Question]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error}); correct the name") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            with _naming(f"{path}:{number}"):
                yield moments.read_charades(line, str(number))


def _read_videos(path: Path, by_video: Mapping[str, Any]) -> Iterator[Question]:
    for name, record in by_video.items():
        if temp_compass.is_sheet(record):
            with _naming(f"{path}: {name}"):
                yield from temp_compass.read_video(name, record)
            continue
        if not isinstance(record, dict) or not record.keys() >= moments.VIDEO_KEYS:
            raise UserError(
                f"{path}: got {shown(record)} for {name!r}, expected an object with "
                f"{sorted(moments.VIDEO_KEYS)}, as ActivityNet Captions has, or questions by "
                "aspect, as TempCompass has"
            )
        with _naming(f"{path}: {name}"):
            yield from moments.read_video(name, record)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Begin an error of the `with` block with file and line."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _object(path: Path) -> dict[str, Any] | None:
    """Return the object of a JSON file; None if it holds a list, or an object a line."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}); correct the name") from error
    except (ValueError, RecursionError):
        return None
    is_record = isinstance(value, dict) and bool(value.keys() & {"messages", "video_id", "qid"})
    return value if isinstance(value, dict) and not is_record else None


def written(questions: Sequence[Question]) -> str:
    """Return questions as the lines of a sample file."""
    return "".join(json.dumps(question.written()) + "\n" for question in questions)
