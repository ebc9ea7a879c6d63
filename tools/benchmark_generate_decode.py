# SPDX-License-Identifier: Apache-2.0
"""One new token of each of several long sequences: a layer and its parts, a tick as a graph."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from megatron_keye.decoder import cached_attention
from megatron_keye.decoder.key_cache import LayerCache
from megatron_keye.decoder.row import RowMeter
from megatron_keye.kernels.sparse_decode import sparse_decode
from megatron_keye.rollout.cache import allocate
from megatron_keye.rollout.new_tokens import RankCache
from megatron_keye.rollout.pages import PagePool, PageTable
from megatron_keye.rollout.replayed import check_graphs
from megatron_keye.rollout.replica import Replica
from megatron_keye.rollout.sequence import Answer, Group
from tools.benchmark_generate_setup import Bench, Clock, repeated

_L2_BYTES = 256 * 2**20
"""Several times the L2 cache of any GPU."""


def time_decode(bench: Bench) -> Iterator[dict[str, Any]]:
    """Yield a line for each batch."""
    for batch in bench.options.batches:
        answers, replica = _prepared(bench, batch)
        with bench.model.evaluation(), torch.no_grad():
            yield {
                "op": "decode",
                "batch": batch,
                "tokens": bench.options.tokens,
                **_timed(bench, partial(replica.run_answers, answers)),
            }
        del answers, replica


def compare_graphs(bench: Bench) -> Iterator[dict[str, Any]]:
    """Yield a line for each batch: a tick as one CUDA graph, and launched kernel by kernel."""
    run = replace(bench.run, rollout=replace(bench.run.rollout, uses_cuda_graphs=True))
    check_graphs(run, bench.stage, bench.device)
    groups = bench.grid.decoder
    assert groups is not None, "the only rank has the decoder"
    for batch in bench.options.batches:
        answers, replica = _prepared(bench, batch)
        with bench.model.evaluation(), torch.no_grad():
            replays = Replica(run, bench.stage, replica.cache, groups.tp, RowMeter())
            eager, graph = (
                _per_call(bench, partial(each.run_answers, answers), bench.options.repeats)
                for each in (replica, replays)
            )
        yield {
            "op": "graphs",
            "batch": batch,
            "tokens": bench.options.tokens,
            "eager_tick_us": round(eager, 1),
            "graph_tick_us": round(graph, 1),
            "eager_to_graph": round(eager / graph, 3),
        }
        replays.release()
        del answers, replica, replays


def _timed(bench: Bench, tick: Callable[[], object]) -> dict[str, Any]:
    """Return the microseconds of a tick, of one layer in it, and of the layer's parts."""
    layers = bench.stage.block.layers
    repeats, num_layers = bench.options.repeats, len(layers)
    whole = _per_call(bench, tick, repeats)
    calls: list[Callable[[], object]] = []

    def watched(*inputs: Any, **options: Any) -> tuple[Tensor, Tensor]:
        calls[:] = [partial(sparse_decode, *inputs, **options)]
        return sparse_decode(*inputs, **options)

    with patch.object(cached_attention, "sparse_decode", watched):
        layer = _layers(bench, tick, repeats) / num_layers
    with patch.object(cached_attention, "sparse_decode", _nothing):
        dense = _layers(bench, tick, repeats) / num_layers
    own = _operator_time(bench, calls[0])
    return {
        "tick_us": round(whole, 1),
        "layer_us": round(layer, 1),
        "operator_us": round(own, 1),
        "dense_us": round(dense, 1),
        "layer_to_parts": round(layer / (own + dense), 3),
    }


def _nothing(
    q_BTIJ: Tensor, gate_BTI: Tensor, q_BTHC: Tensor, cache: Any, top_k: int, **options: Any
) -> tuple[Tensor, Tensor]:
    """Stand for the operator, without work."""
    indices_BTK = torch.full(
        (*q_BTHC.shape[:2], top_k), -1, dtype=torch.int32, device=q_BTHC.device
    )
    return torch.zeros_like(q_BTHC), indices_BTK


def _per_call(bench: Bench, tick: Callable[[], object], repeats: int) -> float:
    """Return the median microseconds of a call, with what the host does."""
    found, began = [], time.perf_counter()
    for _ in repeated(tick, repeats):
        if bench.device.type == "cuda":
            torch.cuda.synchronize()
        found.append(1e6 * (time.perf_counter() - began))
        began = time.perf_counter()
    return statistics.median(found)


def _layers(bench: Bench, tick: Callable[[], object], repeats: int) -> float:
    """Return the median microseconds from the first layer's beginning to the last one's end."""
    layers, clock, found = bench.stage.block.layers, Clock(bench.device), []
    with clock.around(layers[0], layers[-1]):
        for number, _ in enumerate(repeated(tick, repeats)):
            milliseconds = clock.milliseconds()
            # The first one has the calls before it, too.
            if number > 0:
                found.append(1e3 * milliseconds)
    return statistics.median(found)


def _operator_time(bench: Bench, call: Callable[[], object]) -> float:
    """Return the microseconds of the operator by itself, with a cold L2 cache, in a CUDA graph."""
    clock, found, timed = Clock(bench.device), [], call
    flush = torch.empty(0, dtype=torch.uint8, device=bench.device)
    if bench.device.type == "cuda":
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        timed, flush = graph.replay, flush.new_empty(_L2_BYTES)
    for _ in range(bench.options.repeats):
        flush.zero_()
        clock.start()
        timed()
        clock.stop()
        found.append(1e3 * clock.milliseconds())
    return statistics.median(found)


def _prepared(bench: Bench, batch: int) -> tuple[list[Answer], Replica]:
    """Return answers to long prompts of their own, whose keys are random, and what runs them."""
    run, page = bench.run, bench.run.rollout.page_tokens
    pages_each = -(-(bench.options.tokens + 1) // page)
    pool = PagePool(batch * pages_each)
    request = bench.request()
    answers = []
    for key in range(batch):
        answer = Answer(Group(replace(request, key=key), run.model.vision.merge_size), 0)
        answer.table = PageTable(pool, page)
        answer.token_ids, answer.num_cached = [key], bench.options.tokens
        answers.append(answer)
    # Pages of one sequence are not neighbours, as after many answers.
    for _ in range(pages_each):
        for answer in answers:
            assert answer.table is not None, "it was made above"
            answer.table.grow(page)
    layers = allocate(run, pool.num_pages, bench.device)
    for layer in layers:
        _fill(layer)
    groups = bench.grid.decoder
    assert groups is not None, "the only rank has the decoder"
    cache = RankCache(
        layers=layers, page_tokens=page, tensor_rank=0, num_tensor_ranks=1, device=bench.device
    )
    return answers, Replica(run, bench.stage, cache, groups.tp, RowMeter())


def _fill(layer: LayerCache) -> None:
    for heads_PLGC, scales_PLG in (
        (layer.keys_PLGC, layer.key_scales_PLG),
        (layer.values_PLGC, layer.value_scales_PLG),
    ):
        if scales_PLG is None:
            heads_PLGC.normal_()
        else:
            heads_PLGC.view(torch.uint8).random_(0, 0x78)  # Positive e4m3 numbers.
            scales_PLG.fill_(2.0**-8)
    if layer.index_scales_PL is None:
        layer.index_keys_PLJ.normal_()
    else:
        layer.index_keys_PLJ.view(torch.uint8).random_(0, 0x78)
        layer.index_scales_PL.fill_(2.0**-6)
