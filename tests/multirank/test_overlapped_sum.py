# SPDX-License-Identifier: Apache-2.0
"""Gradients summed under the backward pass are those that are summed after it."""

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_keye.checkpoint.optimizer_shards import gather_whole, optimizers_of
from megatron_keye.config import RunConfig
from megatron_keye.config import megatron as megatron_config
from megatron_keye.model import KeyeModel
from megatron_keye.optim.optimizer import JointOptimizer
from megatron_keye.optim.overlapped_sum import OverlappedSum
from tests.support.ranks import run_on_ranks
from tests.support.tiny import mixed_rows, tiny_model, tiny_run
from tests.support.train import build_step, let_go

CASES: dict[str, dict[str, Any]] = {
    "experts, replicas whose last rows attend otherwise": {
        "data": 2,
        "expert": 2,
        "training": {"dense_up_to": 34},
    },
    "context, each replica its own optimizer": {"context": 2},
}


def run_of(case: str, overlap: str, device: str = "cpu") -> RunConfig:
    """Return a run whose gradients are not clipped, since buckets round their norm otherwise."""
    options = dict(CASES[case])
    if device == "cuda":
        options["training"] = options.get("training", {}) | {"precision": "bf16"}
    run = tiny_run(model=tiny_model(num_layers=2), device=device, **options)
    optimizer = replace(
        run.training.optimizer,
        overlap=overlap,
        clip_gradient_norm=0.0,
        distributed="own optimizer" not in case,
    )
    return replace(run, training=replace(run.training, optimizer=optimizer))


def _digest(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _moments(model: KeyeModel, optimizer: JointOptimizer) -> dict[str, str]:
    """Return digests of the whole moments that this rank would save, by the weight's name."""
    names = {
        id(weight): f"{name}, rank {dist.get_rank()}" if ".experts." in name else name
        for module in model.wrapped()
        for name, weight in module.named_parameters()
    }
    shards = (shard for each in optimizers_of(optimizer) for shard in gather_whole(each))
    return {
        names[id(shard.weight)]: _digest(each.flatten() for each in shard.kept.values())
        for shard in shards
    }


def _steps_on_rank(
    runs: list[str],
) -> list[tuple[Any, str, list[tuple[int, int]], dict[str, str]]]:
    """Return the figures of two steps, a digest of the weights, how many sums were early of how
    many, and digests of moments.
    """
    megatron_config.BUCKET_ELEMENTS = 3000
    start_rest, results = OverlappedSum.start_rest, []
    for run_json in runs:
        started: list[tuple[int, int]] = []

        def counted(sums: OverlappedSum) -> None:
            started.append((len(sums._norms), len(sums._groups)))  # noqa: B023
            start_rest(sums)

        OverlappedSum.start_rest = counted  # type: ignore[method-assign]
        try:
            _, model, optimizer, step = build_step(RunConfig.from_json(run_json))
            metrics = [step(mixed_rows(number), number) for number in range(2)]
        finally:
            OverlappedSum.start_rest = start_rest  # type: ignore[method-assign]
        weights = _digest(weight for each in model.wrapped() for weight in each.parameters())
        figures = [(each.loss, each.indexer_kl, each.gradient_norm) for each in metrics]
        results.append((figures, weights, started, _moments(model, optimizer)))
        let_go(model)
    return results


@pytest.mark.parametrize("case", CASES)
def test_sums_under_the_backward_pass_change_no_weight(case: str) -> None:
    runs = [run_of(case, overlap).to_json() for overlap in ("on", "auto")]
    ranks = run_on_ranks(2, _steps_on_rank, runs)
    moments: list[dict[str, str]] = [{}, {}]
    for overlapped, plain in ranks:
        assert plain[2] == [(0, 0)] * 2, "a CPU sums afterwards"
        assert overlapped[0] == [pytest.approx(each, rel=1e-6) for each in plain[0]]
        assert overlapped[1] == plain[1]
        for kept, own in zip(moments, (overlapped, plain), strict=True):
            kept |= own[3]
    assert moments[0] == moments[1] and len(moments[0]) > 30
    early = [[num / total for num, total in overlapped[2]] for overlapped, _ in ranks]
    # A replica whose last row attends densely has no gradients of indexers, and holds back sums
    # that the other one starts.
    assert max(early) == [1, 1] and (min(early)[0] < 0.5) == ("otherwise" in case)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
@pytest.mark.parametrize("case", CASES)
def test_sums_under_the_backward_pass_train_as_others_on_gpus(case: str) -> None:
    """Kernels with atomic additions keep it from being the same bits."""
    runs = [run_of(case, overlap, "cuda").to_json() for overlap in ("auto", "off")]
    for overlapped, plain in run_on_ranks(2, _steps_on_rank, runs, device="cuda"):
        assert overlapped[2][0][1] >= 4
        for mine, theirs in zip(overlapped[0], plain[0], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-2)
