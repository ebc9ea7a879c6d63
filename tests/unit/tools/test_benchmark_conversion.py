# SPDX-License-Identifier: Apache-2.0
"""The benchmark's checkpoint is as large as asked for, of whole full-size layers."""

from math import prod

from megatron_keye.checkpoint.hf.parameter_shapes import parameter_shapes
from tools import benchmark_conversion


def test_whole_layers_make_up_the_size() -> None:
    run = benchmark_conversion.sized_run(8.0)
    num_bytes = 2 * sum(prod(shape) for shape in parameter_shapes(run.model).values())
    assert run.model.decoder.num_layers == 5
    assert 8_000_000_000 <= num_bytes < 9_300_000_000
