# SPDX-License-Identifier: Apache-2.0
"""Vision ranks hold no more features and gradients than they still need."""

import gc
import time

import torch
import torch.distributed as dist

from megatron_keye.config import RunConfig
from megatron_keye.data.row import PackedRow
from megatron_keye.observe.recorder import Recorder
from megatron_keye.parallel.grid import build_grid
from megatron_keye.parallel.transport import FeatureTransport
from megatron_keye.training.microbatch import plan_rows
from tests.support.ranks import run_on_ranks
from tests.support.tiny import packed_row, tiny_run

WIDTH = 5
"""Of the features, and of no other tensor in the process."""


def test_features_are_freed_when_their_gradient_is_back() -> None:
    run = tiny_run(vision_ranks=1, chunk_patches=1000, training={"rows_per_step": 1})
    rows = [packed_row(0, (12, ((4, 6), (4, 6))))]
    assert run_on_ranks(2, _rows_held, run.to_json(), rows)[1] == {"sent": 12, "returned": 0}


def _rows_held(run_json: str, rows: list[PackedRow]) -> dict[str, int]:
    """Send features and return their gradients; count the rows that a vision rank holds."""
    run = RunConfig.from_json(run_json)
    grid, plan, cpu = build_grid(run.parallel), plan_rows(rows, run), torch.device("cpu")
    transport = FeatureTransport(
        plan, grid, Recorder(), width=WIDTH, dtype=torch.float32, device=cpu
    )
    transport.start()
    held = {}
    if grid.rank == 0:
        dist.barrier()  # The features stay under way until the vision rank has counted them.
        transport.return_gradients(0, transport.take_features(0))
        transport.finish_decoder()
    else:
        transport.send_features(0, torch.ones(plan.chunks[0].num_tokens, WIDTH))
        held["sent"] = _count_rows(skip=12)
        dist.barrier()
        transport.take_gradients(0)
        # A thread of gloo holds an exchange's tensors for a moment after its end.
        deadline = time.monotonic() + 10
        while (held := held | {"returned": _count_rows()})["returned"]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.01)
    transport.finish()
    return held


def _count_rows(skip: int = 0) -> int:
    """Count rows in all tensors of that width, less `skip` that an exchange will fill."""
    tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.dim() == 2]
    return sum(len(t) for t in tensors if t.shape[1] == WIDTH) - skip
