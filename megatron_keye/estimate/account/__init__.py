# SPDX-License-Identifier: Apache-2.0
"""One account of a step's FLOPs and bytes, by module, for metrics, plans and profiles.

Its interface is re-exported here.
"""

from megatron_keye.estimate.account.step import (
    job_works,
    model_flops,
    pass_works,
    picture_works,
    rank_works,
    row_works,
)
from megatron_keye.estimate.account.work import (
    MODULES,
    Module,
    Passes,
    Precision,
    Work,
    add_works,
    total_executed_flops,
    total_model_flops,
)

__all__ = [
    "MODULES",
    "Module",
    "Passes",
    "Precision",
    "Work",
    "add_works",
    "job_works",
    "model_flops",
    "pass_works",
    "picture_works",
    "rank_works",
    "row_works",
    "total_executed_flops",
    "total_model_flops",
]
