# SPDX-License-Identifier: Apache-2.0
"""Gathers of context-parallel ranks run under other work, and change no bit."""

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_keye.config import RunConfig
from megatron_keye.decoder import attention
from tests.support.ranks import run_on_ranks
from tests.support.tiny import mixed_rows, tiny_model, tiny_run
from tests.support.train import build_step, let_go

TRAININGS: list[dict[str, Any]] = [
    {},
    {"recompute": "selective", "dense_up_to": 34},
    {"phase": "indexer_warmup"},
]


def run_of(training: dict[str, Any] | None = None, device: str = "cpu") -> RunConfig:
    """Return a run of two context-parallel ranks."""
    training = {"rows_per_step": 2, **(training or {})}
    model = tiny_model(num_layers=2)
    return tiny_run(context=2, model=model, training=training, device=device)


class PlainGather:
    """Gathers at once, by Megatron-Core's own function, and sums gradients likewise."""

    def __init__(self, *local: Tensor, order_S: Tensor, group: dist.ProcessGroup) -> None:
        self._rows = [
            gather_from_sequence_parallel_region(each.contiguous(), group=group)[order_S]
            for each in local
        ]

    def start(self) -> None:
        pass

    def rows(self) -> list[Tensor]:
        return self._rows


def _steps_on_rank(runs: list[str]) -> list[list[tuple[Any, str]]]:
    """Return figures and a digest of new weights, of gathers as in training and of plain ones."""
    overlapped = attention.RowGather
    results = []
    for run_json in runs:
        pair = []
        for gather in (overlapped, PlainGather):
            attention.RowGather = gather
            try:
                _, model, _, step = build_step(RunConfig.from_json(run_json))
                metrics = step(mixed_rows(0)[::3], 0)
            finally:
                attention.RowGather = overlapped
            digest = hashlib.sha256()
            for module in model.wrapped():
                for weight in module.parameters():
                    digest.update(weight.detach().cpu().view(torch.uint8).numpy().tobytes())
            let_go(model)
            figures = (metrics.loss, metrics.indexer_kl, metrics.gradient_norm)
            pair.append((figures, digest.hexdigest()))
        results.append(pair)
    return results


def test_gathers_under_other_work_give_the_bits_of_plain_ones() -> None:
    runs = [run_of(training).to_json() for training in TRAININGS]
    for rank in run_on_ranks(2, _steps_on_rank, runs):
        for overlapped, plain in rank:
            # As text, in which NaN, the KL where no indexer learns, equals itself.
            assert str(overlapped) == str(plain)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_gathers_under_other_work_train_as_plain_ones_on_gpus() -> None:
    """Kernels with atomic additions keep it from being the same bits."""
    trainings = [training | {"precision": "bf16"} for training in TRAININGS]
    runs = [run_of(training, "cuda").to_json() for training in trainings]
    for rank in run_on_ranks(2, _steps_on_rank, runs, device="cuda"):
        for (overlapped, _), (plain, _) in rank:
            assert overlapped == pytest.approx(plain, rel=1e-3, nan_ok=True)


def _order_on_rank(run_json: str) -> list[str]:
    """Return what one layer calls, and when exchanges of its keys and values start and end."""
    calls: list[str] = []
    undo: list[tuple[Any, str, Any]] = []

    def replace(where: Any, name: str, new: Any) -> None:
        undo.append((where, name, getattr(where, name)))
        setattr(where, name, new)

    def named(call: Callable[..., Any], name: str, *, has_backward: bool) -> Callable[..., Any]:
        def recorded(*inputs: Any, **options: Any) -> Any:
            calls.append(name)
            result = call(*inputs, **options)
            first = result[0] if isinstance(result, tuple) else result
            if has_backward and first.requires_grad:
                first.register_hook(lambda _: calls.append(f"{name} backward"))
            return result

        return recorded

    class Work:
        def __init__(self, work: Any, name: str) -> None:
            self._work, self._name = work, name

        def wait(self) -> None:
            calls.append(f"{self._name} arrived")
            self._work.wait()

    def exchange(call: Callable[..., Any], verb: str) -> Callable[..., Any]:
        def recorded(out: Tensor, local: Tensor, *, group: Any, async_op: bool = False) -> Any:
            work = call(out, local, group=group, async_op=async_op)
            if not async_op:
                return work
            name = f"{verb} {'indexer keys' if local.dim() == 2 else 'heads'}"
            calls.append(name)
            return Work(work, name)

        return recorded

    for name, has_backward in (
        ("lightning_indexer", False),
        ("selected_indexer_scores", True),
        ("sparse_attention_with_loss", True),
    ):
        call = named(getattr(attention, name), name, has_backward=has_backward)
        replace(attention, name, call)
    replace(dist, "all_gather_into_tensor", exchange(dist.all_gather_into_tensor, "gather"))
    replace(dist, "reduce_scatter_tensor", exchange(dist.reduce_scatter_tensor, "sum"))
    try:
        _, model, _, step = build_step(RunConfig.from_json(run_json))
        step(mixed_rows(0)[:1], 0)
    finally:
        for where, name, old in reversed(undo):
            setattr(where, name, old)
    let_go(model)
    return calls


def test_exchanges_start_before_the_work_that_hides_them() -> None:
    run = run_of({"rows_per_step": 1})
    calls, others = run_on_ranks(2, _order_on_rank, run.to_json())
    assert calls == others, "ranks exchange in one order"
    layer = [
        *("gather indexer keys", "gather heads"),
        *("gather indexer keys arrived", "lightning_indexer", "selected_indexer_scores"),
        *("gather heads arrived", "sparse_attention_with_loss"),
    ]
    back = [
        *("sparse_attention_with_loss backward", "sum heads"),
        *("selected_indexer_scores backward", "sum indexer keys"),
        *("sum indexer keys arrived", "sum heads arrived"),
    ]
    num_layers = run.model.decoder.num_layers
    assert calls == layer * num_layers + back * num_layers
