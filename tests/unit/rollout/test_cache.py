# SPDX-License-Identifier: Apache-2.0
"""What the cache of a rank takes, keeps and copies, in the model's type and in 8 bits."""

from dataclasses import replace

import pytest
import torch

from megatron_keye.config import RolloutConfig, RunConfig
from megatron_keye.errors import UserError
from megatron_keye.recipes import load_recipe
from megatron_keye.rollout.cache import allocate, bytes_per_token, check_cache, copy_pages, forget
from megatron_keye.rollout.grid import generating_run
from tests.support.tiny import tiny_model, tiny_run

CPU = torch.device("cpu")
QUANTIZATIONS = pytest.mark.parametrize("cache_quantization", ["none", "fp8"])


def run_with(cache_quantization: str, indexer: str = "none") -> RunConfig:
    model = tiny_model()
    decoder = replace(model.decoder, indexer=replace(model.decoder.indexer, quantization=indexer))
    rollout = RolloutConfig(page_tokens=4, cache_quantization=cache_quantization)
    return replace(tiny_run(model=replace(model, decoder=decoder)), rollout=rollout)


@QUANTIZATIONS
@pytest.mark.parametrize("indexer", ["none", "fp8"])
def test_a_token_takes_what_is_counted(cache_quantization: str, indexer: str) -> None:
    run = run_with(cache_quantization, indexer)
    layers = allocate(run, 9, CPU)
    taken = sum(t.nbytes for layer in layers for t in vars(layer).values() if t is not None)
    # One page more takes what padding writes.
    assert taken == 10 * 4 * bytes_per_token(run)


def test_the_released_model_takes_half() -> None:
    run = load_recipe("keye_30b_a3b")(num_ranks=64, has_gpu=True)
    one = generating_run(replace(run, rollout=RolloutConfig(tensor=1)), 64)
    rounded = replace(one, rollout=replace(one.rollout, cache_quantization="fp8"))
    assert (bytes_per_token(one), bytes_per_token(rounded)) == (104_448, 56_832)


@QUANTIZATIONS
def test_a_page_is_copied_whole_and_forgotten(cache_quantization: str) -> None:
    layers = allocate(run_with(cache_quantization), 3, CPU)
    slots, generator = torch.arange(4, 8), torch.Generator().manual_seed(1)
    for layer in layers:
        layer.write_heads(slots, *torch.randn(2, 4, 4, 16, generator=generator))
        layer.write_index_keys(slots, torch.randn(4, 8, generator=generator))
    copy_pages(layers, {2: 1})
    for layer in layers:
        read = (
            *layer.read_heads(slots, torch.float32),
            layer.read_index_keys(slots, torch.float32),
        )
        copy = (
            *layer.read_heads(slots + 4, torch.float32),
            layer.read_index_keys(slots + 4, torch.float32),
        )
        assert all(
            torch.equal(a, b) and a.isfinite().all() for a, b in zip(read, copy, strict=True)
        )
    forget(layers)
    for layer in layers:
        assert all(each.float().isnan().all() for each in vars(layer).values() if each is not None)


def test_a_gpu_without_e4m3_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    check_cache(run_with("none"), torch.device("cuda"))
    check_cache(run_with("fp8"), CPU)
    with pytest.raises(UserError, match="got 'fp8' on a GPU of compute capability 8.0, expected"):
        check_cache(run_with("fp8"), torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    check_cache(run_with("fp8"), torch.device("cuda"))
