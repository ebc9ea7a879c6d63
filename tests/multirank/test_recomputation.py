# SPDX-License-Identifier: Apache-2.0
"""What is recomputed changes no bit of a step, and never selects again."""

import hashlib
from typing import Any

import pytest
import torch

from megatron_keye.config import RunConfig
from megatron_keye.decoder import attention
from tests.support.ranks import run_on_ranks
from tests.support.tiny import mixed_rows, tiny_run
from tests.support.train import build_step, let_go

CHOICES: list[dict[str, Any]] = [
    {"recompute": "none"},
    {"recompute": "experts"},
    {"recompute": "selective"},
    {"recompute": "full"},
    {"recompute": "selective", "keeps_in_host_memory": True},
]
PHASES: dict[str, dict[str, Any]] = {
    "sparse": {},
    "dense": {"phase": "dense"},
    "warm-up": {"phase": "indexer_warmup"},
    "dense and sparse rows": {"dense_up_to": 34},
    "indexers alone": {"frozen": ("vision", "projector", "decoder")},
}


def _step_on_rank(runs: list[str]) -> list[tuple[Any, ...]]:
    """Return the step's figures, a digest of all new weights and the selections made."""
    results = []
    select = attention.lightning_indexer
    for run_json in runs:
        selections = []

        def counted(*inputs: Any, **options: Any) -> torch.Tensor:
            selections.append(len(inputs))  # noqa: B023
            return select(*inputs, **options)

        attention.lightning_indexer = counted
        try:
            _, model, _, step = build_step(RunConfig.from_json(run_json))
            metrics = step(mixed_rows(0), 0)
        finally:
            attention.lightning_indexer = select
        digest = hashlib.sha256()
        for module in model.wrapped():
            for weight in module.parameters():
                digest.update(weight.detach().cpu().view(torch.uint8).numpy().tobytes())
        let_go(model)
        figures = {
            name: getattr(metrics, name) for name in ("loss", "indexer_kl", "gradient_norm")
        }
        results.append((figures, digest.hexdigest(), len(selections)))
    return results


@pytest.mark.parametrize("training", PHASES.values(), ids=PHASES)
def test_every_choice_gives_the_same_bits_and_selects_once(training: dict[str, Any]) -> None:
    runs = [tiny_run(training={**training, **choice}).to_json() for choice in CHOICES]
    ((kept, *recomputed),) = run_on_ranks(1, _step_on_rank, runs)
    # As text, in which NaN, the KL where no indexer learns, equals itself.
    assert [str(each) for each in recomputed] == [str(kept)] * 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("training", PHASES.values(), ids=PHASES)
def test_every_choice_trains_as_none_on_a_gpu(training: dict[str, Any]) -> None:
    """Kernels with atomic additions keep it from being the same bits."""
    runs = [
        tiny_run(device="cuda", training={**training, **choice, "precision": "bf16"}).to_json()
        for choice in CHOICES
    ]
    ((kept, *others),) = run_on_ranks(1, _step_on_rank, runs, device="cuda")
    for figures, _, num_selections in others:
        assert num_selections == kept[2]
        assert figures == pytest.approx(kept[0], rel=1e-3, nan_ok=True)
