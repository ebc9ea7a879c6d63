# SPDX-License-Identifier: Apache-2.0
"""Degrees of layouts that are tried with gloo on CPUs and with NCCL on GPUs."""

FOUR_RANKS = {
    "tensor, pipeline": {"tensor": 2, "pipeline": 2},
    "tensor, context, expert": {"tensor": 2, "context": 2, "expert": 4},
    "interleaved pipeline, data, expert": {
        "pipeline": 2,
        "virtual_stages": 2,
        "data": 2,
        "expert": 2,
    },
    "pipeline, context": {"pipeline": 2, "context": 2},
    "context of four": {"context": 4},
}
