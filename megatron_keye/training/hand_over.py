# SPDX-License-Identifier: Apache-2.0
"""Whether a run may start from the weights it names, by the runs that trained them.

An indexer learns from dense attention before attention follows it, and what changes the decoder
under dense attention leaves its indexers behind. A wrong order trains without an error, and badly.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from megatron_keye.checkpoint.history import HISTORY, PastRun, read_history
from megatron_keye.config.parts import Part
from megatron_keye.config.run import RunConfig
from megatron_keye.config.training import Phase
from megatron_keye.errors import UserError

Attention = Literal["dense", "warmed up", "sparse"]
"""What weights are ready for: "dense": their indexers have learned nothing of this decoder."""

_WARM_UP_FIRST = (
    "indexers that have learned nothing of this decoder's attention would select its keys at "
    'random; run training.phase="indexer_warmup" from these weights first'
)
_LEAVES_INDEXERS = (
    "training the decoder under dense attention leaves its indexers behind; finish the dense "
    'phases before the warm-up, or train on with training.phase="sparse"'
)
_REFUSED: dict[tuple[Attention, Phase], str] = {
    ("dense", "sparse"): _WARM_UP_FIRST,
    ("warmed up", "dense"): _LEAVES_INDEXERS,
    ("sparse", "dense"): _LEAVES_INDEXERS,
    ("sparse", "indexer_warmup"): (
        "this decoder attends to the keys that its indexers select, and the warm-up would teach "
        'them an attention to all keys that it no longer has; use training.phase="sparse"'
    ),
}
"""Why a phase makes no sense after weights; all other pairs do."""

_logger = logging.getLogger(__name__)


def begin(run: RunConfig, rank: int) -> list[PastRun]:
    """Return the runs that trained the weights which a new run starts from.

    Args:
        run: The run, which continues no checkpoint.
        rank: This rank; rank 0 logs what is doubtful.

    Returns:
        Earlier runs, the first one first; empty for random weights.

    Raises:
        UserError: When the run's phase makes no sense after theirs.
    """
    weights = run.training.checkpoint.weights
    history = read_history(Path(weights)) if weights else []
    if history is None:
        doubts = [f"{weights} has no {HISTORY}, so that nothing tells what its weights are for"]
    else:
        if weights and run.training.checks_hand_over:
            check_hand_over(run, history)
        doubts = _doubts(run, history)
    for doubt in doubts if rank == 0 else []:
        _logger.warning(doubt)
    return history or []


def check_hand_over(run: RunConfig, history: Sequence[PastRun]) -> None:
    """Raise a UserError if the run's phase makes no sense after those of its weights."""
    attention, phase = attention_of(history), run.training.phase
    reason = _REFUSED.get((attention, phase))
    if reason is not None:
        past = ", ".join(f"{each['run']} ({each['phase']})" for each in history)
        raise UserError(
            f"training.phase: got {phase!r} with weights trained by {past or 'no run'}: {reason}; "
            "if it is meant, set training.checks_hand_over=false"
        )


def attention_of(history: Sequence[PastRun]) -> Attention:
    """Return which attention the last runs have prepared the weights for."""
    attention: Attention = "dense"
    for past in history:
        if past["phase"] == "dense" and "decoder" in past["trained"]:
            attention = "dense"
        elif "indexer" in past["trained"]:
            attention = "warmed up" if past["phase"] == "indexer_warmup" else "sparse"
    return attention


def _doubts(run: RunConfig, history: Sequence[PastRun]) -> list[str]:
    """Return a sentence if parts that the run uses stay as they were drawn at random."""
    used: list[Part] = ["vision", "projector", "decoder"]
    if run.training.phase == "sparse":
        used.append("indexer")
    learned = {part for past in history for part in past["trained"]}
    learned |= {part for part in used if run.training.is_trained(part, is_adapter=False)}
    never = [part for part in used if part not in learned]
    if not never:
        return []
    return [
        f"{' and '.join(never)}: no run has trained these weights and this one does not; what "
        "learns will learn to work with random ones (training.checkpoint.weights)"
    ]
