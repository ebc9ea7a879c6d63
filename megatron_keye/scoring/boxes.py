# SPDX-License-Identifier: Apache-2.0
"""Boxes in a picture, matched with the right ones so that they agree best."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_keye.data.conversation.values import number, shown
from megatron_keye.errors import UserError
from megatron_keye.scoring.extras import import_for_task
from megatron_keye.scoring.final_answer import final_answer, split_json
from megatron_keye.scoring.truth import Score, Truth, check_keys

Box = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels, or any other unit of both sides."""

_KEYS = ("bbox_2d", "bbox", "box")
_DUPLICATE_OVERLAP = 0.7
"""IoU from which two boxes of an answer are the same one."""
_DUPLICATE_COST = 0.1
"""What each of them costs."""
_MOST_BOXES = 1_000
"""Boxes of an answer that are compared; those behind them count as wrong ones."""


@dataclass(frozen=True, kw_only=True)
class BoxTruth(Truth):
    """Where something is in a picture."""

    metrics = ("box score",)
    boxes: tuple[Box, ...]
    """The boxes; none where it is not there."""

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> "BoxTruth":
        """Read {"boxes": [[left, top, right, bottom], ...]}."""
        check_keys(raw, {"boxes"})
        if not isinstance(raw["boxes"], list):
            raise UserError(f"'boxes': got {shown(raw['boxes'])}, expected a list of boxes")
        return cls(boxes=tuple(map(_read_box, raw["boxes"])))

    def written(self) -> dict[str, Any]:
        """Return what `read` reads."""
        return {"boxes": [list(box) for box in self.boxes]}

    def score(self, answer: str, seconds: float | None) -> Score:
        """Return half the soft F1 plus half the mean IoU, less 0.1 for each box that comes twice.

        Boxes are matched one to one so that the sum of their IoU is largest (Hungarian method);
        the soft F1 is 2 sum / (boxes of the answer + of the truth), the mean sum / the larger of
        both. Where nothing is there, an empty list scores 1 and any box 0.
        """
        boxes = parse_boxes(answer)
        if boxes is None:
            return Score(value=0.0, understood=None)
        understood = [list(box) for box in boxes]
        if not boxes or not self.boxes:
            return Score(value=float(not boxes and not self.boxes), understood=understood)
        compared = boxes[:_MOST_BOXES]
        total = _matched(_ious(compared, self.boxes))
        repeated = np.triu(_ious(compared, compared), 1).max(axis=0) >= _DUPLICATE_OVERLAP
        both = total / (len(boxes) + len(self.boxes)) + total / (
            2 * max(len(boxes), len(self.boxes))
        )
        value = both - _DUPLICATE_COST * int(repeated.sum())
        return Score(value=max(0.0, value), understood=understood)


def parse_boxes(answer: str) -> list[Box] | None:
    """Return the boxes of an answer in JSON: [[l, t, r, b], ...] or [{"bbox_2d": [...]}, ...].

    Returns:
        None for an answer without a list, or with one that holds anything but boxes.
    """
    values, _ = split_json(final_answer(answer) or "")
    if not values:
        return None
    last = values[-1]
    if isinstance(last, Mapping) and isinstance(last.get("boxes"), list):
        last = last["boxes"]
    if isinstance(last, Mapping) or (isinstance(last, list) and _is_box(last)):
        last = [last]
    boxes = [_of_json(each) for each in last] if isinstance(last, list) else [None]
    known = [box for box in boxes if box is not None]
    return known if len(known) == len(boxes) else None


def _matched(ious: NDArray[np.float64]) -> float:
    """Return the largest sum of a one-to-one matching."""
    optimize = import_for_task("boxes", "scipy.optimize", "scipy")
    rows, columns = optimize.linear_sum_assignment(ious, maximize=True)
    return float(ious[rows, columns].sum())


def _ious(ones: Sequence[Box], others: Sequence[Box]) -> NDArray[np.float64]:
    """Return intersection over union of each pair [ones, others]."""
    a, b = np.array(ones)[:, None], np.array(others)[None]
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    shared = np.clip(sides, 0, None).prod(axis=-1)
    areas = [(box[..., 2:] - box[..., :2]).prod(axis=-1) for box in (a, b)]
    total = areas[0] + areas[1] - shared
    ious: NDArray[np.float64] = shared / np.where(total > 0, total, 1.0)
    return ious


def _of_json(value: Any) -> Box | None:
    if isinstance(value, Mapping):
        named = [value[key] for key in _KEYS if key in value]
        value = named[0] if len(named) == 1 else None
    if not isinstance(value, list) or not _is_box(value):
        return None
    left, top, right, bottom = map(float, value)
    return (left, top, right, bottom) if left <= right and top <= bottom else None


def _is_box(value: list[Any]) -> bool:
    return len(value) == 4 and all(
        type(side) in (int, float) and abs(side) < 1e9 and math.isfinite(side) for side in value
    )


def _read_box(raw: Any) -> Box:
    expected = "[left, top, right, bottom], the right not before the left"
    if not isinstance(raw, list) or len(raw) != 4:
        raise UserError(f"'boxes': got {shown(raw)}, expected {expected}")
    left, top, right, bottom = (number(side, shown(raw), expected, least=0) for side in raw)
    if right <= left or bottom <= top:
        raise UserError(f"'boxes': got {shown(raw)}, expected {expected}")
    return left, top, right, bottom
