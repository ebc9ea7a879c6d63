# SPDX-License-Identifier: Apache-2.0
"""The attention of a prompt that is read into the cache, beside that of training's forward."""

import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from tools.benchmark_generate_setup import Bench, Clock, repeated

_REPEATS = 3


def time_prefill(bench: Bench) -> Iterator[dict[str, Any]]:
    """Yield a line for a prompt in one piece, and one for pieces of the setting's size."""
    trained = _times(bench, bench.training_forward)
    sizes = (bench.options.tokens, bench.run.rollout.prefill_tokens)
    for size in sorted({min(size, bench.options.tokens) for size in sizes}, reverse=True):
        rollout = replace(
            bench.run.rollout, prefill_tokens=size, cache_tokens=2 * bench.options.tokens
        )
        engine = bench.engine(replace(bench.run, rollout=rollout))

        def read(engine: Any = engine) -> None:
            list(engine.generate([bench.request()]))

        generated = _times(bench, read)
        yield {
            "op": "prefill",
            "tokens": bench.options.tokens,
            "piece_tokens": size,
            "attention_ms": round(generated["attention"], 3),
            "layers_ms": round(generated["layers"], 3),
            "training_attention_ms": round(trained["attention"], 3),
            "training_layers_ms": round(trained["layers"], 3),
            "attention_to_training": round(generated["attention"] / trained["attention"], 3),
            "layers_to_training": round(generated["layers"] / trained["layers"], 3),
        }
        del engine, read


def _times(bench: Bench, call: Callable[[], object]) -> dict[str, float]:
    """Return the median milliseconds of all layers, and of their attention, in a call."""
    layers = bench.stage.block.layers
    attention, whole = Clock(bench.device), Clock(bench.device)
    found = []
    with ExitStack() as opened:
        for layer in layers:
            opened.enter_context(attention.around(layer.self_attention, layer.self_attention))
        opened.enter_context(whole.around(layers[0], layers[-1]))
        for number, _ in enumerate(repeated(call, _REPEATS)):
            times = {"attention": attention.milliseconds(), "layers": whole.milliseconds()}
            # The first one has the calls before it, too.
            if number > 0:
                found.append(times)
    return {name: statistics.median(each[name] for each in found) for name in found[0]}
