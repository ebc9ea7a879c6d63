# SPDX-License-Identifier: Apache-2.0
"""Dense captions: scenes with their times, each described, compared in order."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_keye.data.conversation.values import shown, text
from megatron_keye.errors import UserError
from megatron_keye.scoring.final_answer import final_answer, split_json
from megatron_keye.scoring.intervals import Interval, temporal_iou
from megatron_keye.scoring.parse_intervals import parse_intervals
from megatron_keye.scoring.token_f1 import token_f1
from megatron_keye.scoring.truth import Score, Truth, check_keys, read_interval

_MARKS = " \t:-.,;()[]<>*"
_MOST_SCENES = 500
"""Scenes of an answer that are compared; those behind them count as wrong ones."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A stretch of a video, and what is seen in it."""

    interval: Interval
    """Seconds."""
    caption: str
    """In words."""

    def written(self) -> dict[str, Any]:
        """Return it ready for JSON; an end that is left open is None."""
        start, end = self.interval
        return {
            "start": start,
            "end": end if math.isfinite(end) else None,
            "caption": self.caption,
        }


@dataclass(frozen=True, kw_only=True)
class SceneTruth(Truth):
    """All scenes of a video."""

    metrics = ("scene F1",)
    scenes: tuple[Scene, ...]
    """In order of time, one or more."""

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> "SceneTruth":
        """Read {"scenes": [{"start": 0, "end": 3.5, "caption": "..."}, ...]}."""
        check_keys(raw, {"scenes"})
        scenes = raw["scenes"]
        if not isinstance(scenes, list) or not scenes:
            raise UserError(f"'scenes': got {shown(scenes)}, expected a list of one or more")
        return cls(scenes=tuple(sorted(map(_read_scene, scenes), key=lambda s: s.interval)))

    def written(self) -> dict[str, Any]:
        """Return what `read` reads."""
        return {"scenes": [scene.written() for scene in self.scenes]}

    def score(self, answer: str, seconds: float | None) -> Score:
        """Return 2 sum / (scenes of the answer + scenes of the truth).

        The sum is over pairs of scenes, chosen in order so that it is largest: the overlap of
        their times (tIoU) times the token F1 of their captions.
        """
        scenes = parse_scenes(answer)
        if not scenes:
            return Score(value=0.0, understood=None)
        total = _matched(scenes[:_MOST_SCENES], self.scenes, seconds)
        return Score(
            value=2 * total / (len(scenes) + len(self.scenes)),
            understood=[scene.written() for scene in scenes],
        )


def parse_scenes(answer: str) -> list[Scene]:
    """Return the scenes of an answer in order of time; none if there are no captions with times.

    Read are JSON lists of {"start", "end", "caption"} (or "description", "text"), and lines that
    begin with their times: "<0.0 seconds> to <3.5 seconds>: A ball comes in."
    """
    found = final_answer(answer) or ""
    values, rest = split_json(found)
    listed = [each for value in values for each in _listed(value)]
    scenes = [scene for each in listed if (scene := _of_json(each))]
    scenes = scenes or [scene for line in rest.splitlines() if (scene := _of_line(line))]
    return sorted(scenes, key=lambda scene: scene.interval)


def _matched(answer: Sequence[Scene], truth: Sequence[Scene], seconds: float | None) -> float:
    """Return the largest sum over pairs that keep the order of both, by dynamic programming."""
    best = [0.0] * (len(truth) + 1)
    for scene in answer:
        row = [0.0]
        for place, other in enumerate(truth):
            overlap = temporal_iou([scene.interval], [other.interval], seconds)
            worth = overlap * token_f1(scene.caption, other.caption) if overlap else 0.0
            row.append(max(best[place] + worth, best[place + 1], row[place]))
        best = row
    return best[-1]


def _listed(value: Any) -> list[Any]:
    if isinstance(value, Mapping) and isinstance(value.get("scenes"), list):
        return list(value["scenes"])
    return value if isinstance(value, list) else [value]


def _of_json(value: Any) -> Scene | None:
    if not isinstance(value, Mapping):
        return None
    texts = [value[k] for k in ("caption", "description", "text") if isinstance(value.get(k), str)]
    times = {key: bound for key, bound in value.items() if key not in ("caption", "description")}
    intervals = parse_intervals(json.dumps(times)) if len(texts) == 1 else None
    if not intervals or len(intervals) != 1 or not texts[0].strip():
        return None
    return Scene(interval=intervals[0], caption=texts[0])


def _of_line(line: str) -> Scene | None:
    head, mark, caption = _split_line(line)
    intervals = parse_intervals(head) if mark else None
    if not intervals or len(intervals) != 1 or not caption.strip(_MARKS):
        return None
    return Scene(interval=intervals[0], caption=caption.strip(_MARKS))


def _split_line(line: str) -> tuple[str, str, str]:
    """Return times, the mark behind them and the caption of a line; clock times have colons."""
    match = re.match(r"(.{0,120}?[\d>)\]s])\s*(:\s|\s-\s|\]\s|\)\s)\s*(?=\D)", line)
    return (match[1], match[2], line[match.end() :]) if match else ("", "", "")


def _read_scene(raw: Any) -> Scene:
    if not isinstance(raw, Mapping) or raw.keys() != {"start", "end", "caption"}:
        raise UserError(
            f"'scenes': got {shown(raw)}, expected objects with 'start', 'end' and 'caption'"
        )
    return Scene(
        interval=read_interval([raw["start"], raw["end"]]),
        caption=text(raw["caption"], "'caption'"),
    )
