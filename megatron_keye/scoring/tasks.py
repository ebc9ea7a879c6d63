# SPDX-License-Identifier: Apache-2.0
"""The kinds of questions, by the name that a record has under "task"."""

from megatron_keye.scoring.boxes import BoxTruth
from megatron_keye.scoring.expression import ExpressionTruth
from megatron_keye.scoring.frames import OrderTruth, TimestampTruth
from megatron_keye.scoring.scenes import SceneTruth
from megatron_keye.scoring.truth import (
    CaptionTruth,
    ChoiceTruth,
    CountTruth,
    GroundingTruth,
    Task,
    Truth,
)
from megatron_keye.scoring.words import NumberTruth, TextTruth

TRUTHS: dict[Task, type[Truth]] = {
    "grounding": GroundingTruth,
    "choice": ChoiceTruth,
    "count": CountTruth,
    "caption": CaptionTruth,
    "scenes": SceneTruth,
    "timestamp": TimestampTruth,
    "order": OrderTruth,
    "boxes": BoxTruth,
    "number": NumberTruth,
    "expression": ExpressionTruth,
    "text": TextTruth,
}
"""The kinds of questions, by their task."""
