# SPDX-License-Identifier: Apache-2.0
"""Whether a run may continue a checkpoint: what must be as it was, what may change and is said.

State of another phase or precision does not fit, and an order of samples from another seed would
repeat some and leave out others.
"""

import json
import logging
from enum import Enum
from pathlib import Path
from typing import Any

from megatron_keye.checkpoint.adapters import MERGE
from megatron_keye.checkpoint.convert.to_native import native_shapes
from megatron_keye.checkpoint.saved_run import read_saved_run
from megatron_keye.config.run import RunConfig
from megatron_keye.errors import UserError

_logger = logging.getLogger(__name__)


class Change(Enum):
    """What becomes of a setting that a run changes when it continues a checkpoint."""

    REFUSED = "the saved state does not fit it, or would mean something else"
    SAID = "the run goes on with it, which the log says"
    FREE = "it does not change what the run computes from here on"


_CHANGES = {
    # Also settings that are not listed, and so every new one until it is decided.
    "": Change.SAID,
    "model": Change.REFUSED,
    "model.decoder.experts.balance_loss_weight": Change.SAID,
    "model.decoder.indexer.quantization": Change.SAID,
    "model.decoder.indexer.top_k": Change.SAID,
    "model.decoder.init_std": Change.FREE,
    "data.decode": Change.FREE,
    "data.feature_cache": Change.FREE,
    # The position of the data says where all its sources are; their content is compared there.
    "data.samples": Change.FREE,
    "data.shuffles": Change.REFUSED,
    "parallel": Change.FREE,
    "rollout": Change.FREE,
    # The law of tokens, and where an answer ends, decide what a run learns from.
    "rollout.temperature": Change.SAID,
    "rollout.max_new_tokens": Change.SAID,
    "post_training.kind": Change.REFUSED,
    "post_training.reward_processes": Change.FREE,
    # Who judges what decides what a run learns from.
    "post_training.judge.timeout_seconds": Change.FREE,
    "post_training.judge.cache_folder": Change.FREE,
    "training.phase": Change.REFUSED,
    "training.frozen": Change.REFUSED,
    "training.lora": Change.REFUSED,
    "training.precision": Change.REFUSED,
    "training.seed": Change.REFUSED,
    "training.checkpoint": Change.FREE,
    "training.device_peak_tflops": Change.FREE,
    "training.linear_layers": Change.FREE,
    "training.expert_layers": Change.FREE,
    "training.fusions": Change.FREE,
    "training.hang_minutes": Change.FREE,
    "training.logging": Change.FREE,
    "training.checks_hand_over": Change.FREE,
    "training.validation": Change.FREE,
    "training.evaluation": Change.FREE,
    "data.validation": Change.FREE,
    "data.remote": Change.FREE,
    # Limits and responses; what decides whether an update is made is said.
    "training.health": Change.FREE,
    "training.health.on_spike": Change.SAID,
    "training.health.spike_score": Change.SAID,
    "training.health.window_steps": Change.SAID,
    "training.optimizer.distributed": Change.FREE,
    "training.optimizer.offload": Change.FREE,
    "training.optimizer.overlap": Change.FREE,
    "training.recompute": Change.FREE,
    "training.keeps_in_host_memory": Change.FREE,
    "training.profiler": Change.FREE,
    "training.records_timeline": Change.FREE,
    "training.stop_after_step": Change.FREE,
    "device": Change.FREE,
    "name": Change.FREE,
    "output_dir": Change.FREE,
}
"""By setting or section; the longest name that matches decides."""


def change_of(name: str) -> Change:
    """Return what becomes of a setting that differs, by its dotted name."""
    parts = name.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), -1, -1))
    return next(_CHANGES[prefix] for prefix in prefixes if prefix in _CHANGES)


def check_continues(folder: Path, run: RunConfig) -> None:
    """Refuse settings under which a checkpoint can't be continued, and log others that changed.

    Args:
        folder: A complete checkpoint.
        run: The run that continues it.

    Raises:
        UserError: Names each setting that must be as it was saved, with both values.
    """
    saved = read_saved_run(folder)
    different = saved.differing_settings(run)
    if saved.training.trained_parts == run.training.trained_parts:
        # Written in another order, or frozen in a phase that trains no such part anyway.
        different.pop("training.frozen", None)
    if saved.training.lora.is_same(run.training.lora):
        different.pop("training.lora.targets", None)
    refused = {n: v for n, v in different.items() if change_of(n) is Change.REFUSED}
    if refused:
        raise UserError(
            f"{folder}: was saved with {_list(refused, 0)}, and this run has {_list(refused, 1)}; "
            f"{_remedy(folder, saved, run)}"
        )
    said = [
        f"{name}={_written(old)} -> {_written(new)}"
        for name, (old, new) in different.items()
        if change_of(name) is Change.SAID
    ]
    if said:
        _logger.warning("%s continues with other settings: %s", folder, ", ".join(said))
    weights = run.training.checkpoint.weights
    if weights != saved.training.checkpoint.weights and weights:
        _logger.warning(
            "%s continues, so training.checkpoint.weights=%s is not read", folder, weights
        )


def _remedy(folder: Path, saved: RunConfig, run: RunConfig) -> str:
    back = "set back what differs to continue"
    if native_shapes(saved.model) != native_shapes(run.model):
        return f"{back}, since weights fit models of their own size only"
    if saved.training.lora.is_on and not saved.training.lora.is_same(run.training.lora):
        return f"{back}, or {MERGE}, and begin a run of another name from that"
    return (
        f"{back}, or begin a run of another name from its weights with "
        f"training.checkpoint.weights={folder}"
    )


def _list(different: dict[str, tuple[Any, Any]], index: int) -> str:
    return ", ".join(f"{name}={_written(values[index])}" for name, values in different.items())


def _written(value: Any) -> str:
    """Return a value as --set takes it."""
    return value if isinstance(value, str) and value else json.dumps(value)
