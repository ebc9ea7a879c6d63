# SPDX-License-Identifier: Apache-2.0
"""Whether a run's folder can be written and has room for what the run will save, before it begins.

A disk that is full after hours loses the steps since the last checkpoint.
"""

from dataclasses import replace
from pathlib import Path

from megatron_keye.checkpoint.folders import is_inside, step_of
from megatron_keye.config.parallel import ParallelConfig
from megatron_keye.config.run import RunConfig
from megatron_keye.estimate.parameters import decoder_parameters, vision_parameters
from megatron_keye.estimate.state import optimizer_bytes, state_bytes
from megatron_keye.files.disk import check_writable, gibibytes

_MINIMUM_BYTES = 2**24
"""For the figures and logs of a run, in place of a measurement."""


def check_room(run: RunConfig) -> None:
    """Raise a DiskError unless the run's folder can be written and takes its checkpoints.

    Args:
        run: The run; what it has saved already, and will remove, counts as room. Where epochs
            decide the number of steps, one checkpoint and one export are expected at least.
    """
    saved = sorted(run.folder.glob(f"checkpoints/step-{'[0-9]' * 8}"))
    resume = run.training.checkpoint.resume
    continues = resume == "auto" or (resume != "none" and is_inside(Path(resume), run.folder))
    if continues and saved and 0 < run.training.steps <= step_of(saved[-1]):
        return  # It has ended, and writes nothing.
    weights, checkpoint = saved_bytes(run)
    held, exports = num_held(run), _num_exports(run) * weights
    there = sum(f.stat().st_size for each in saved for f in each.rglob("*")) if continues else 0
    # While a checkpoint is written, none has been removed for it.
    needed = max(held * checkpoint - there, min(held, 1) * checkpoint) + exports
    parts = [
        f"{held} checkpoints of {gibibytes(checkpoint)} (training.checkpoint.keep, and the one "
        "that is being written)" * (held > 0),
        f"less {gibibytes(there)} that are there" * (there > 0),
        f"with {gibibytes(exports)} of exports" * (exports > 0),
    ]
    what = " ".join(filter(None, parts)) or "the run's figures"
    check_writable(run.folder, what, needed_bytes=max(needed, _MINIMUM_BYTES))


def saved_bytes(run: RunConfig) -> tuple[int, int]:
    """Return the bytes of a checkpoint's weights, and of the whole checkpoint with moments."""
    alone = replace(run, parallel=ParallelConfig())
    held = vision_parameters(alone) + decoder_parameters(alone, 0)
    weights = state_bytes(alone, held)["weights"]
    return int(weights), int(weights + optimizer_bytes(alone, held))


def num_held(run: RunConfig) -> int:
    """Return the most checkpoints that are in the run's folder at once."""
    training, settings = run.training, run.training.checkpoint
    num_saves = training.steps // settings.interval_steps if settings.interval_steps else 0
    has_rest = not settings.interval_steps or training.steps % settings.interval_steps > 0
    num_saves = max(num_saves + (settings.saves_last and has_rest), int(settings.saves_last))
    keeps_best = training.validation.patience > 0
    most = settings.keep + 1 if settings.keep else num_saves
    return min(num_saves, most) + keeps_best


def _num_exports(run: RunConfig) -> int:
    """Return the most exports that are in the run's folder at once."""
    training, settings = run.training, run.training.checkpoint
    if not settings.export_every:
        return 0
    interval = settings.interval_steps * settings.export_every
    num_exports = 1 + (training.steps // interval if interval else 0)
    return min(num_exports, settings.keep_exports + 1) if settings.keep_exports else num_exports
