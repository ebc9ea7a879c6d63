# SPDX-License-Identifier: Apache-2.0
"""Metrics of a step that was not run."""

from dataclasses import replace
from typing import Any

from megatron_keye.training.metrics import StepMetrics

_STEP = StepMetrics(
    loss=1.9341,
    indexer_kl=0.123,
    indexer_recall=0.9,
    router_load=1.5,
    gradient_norm=0.57,
    learning_rate=9.8e-5,
    was_applied=True,
    tokens=2_000_000,
    tokens_per_second=1_851_851.0,
    tflops_per_device=345.6,
    mfu=0.351,
    step_seconds=1.08,
    data_wait_seconds=0.01,
    save_seconds=0.0,
    saved_seconds=0.0,
    validation_seconds=0.0,
    decoder_seconds=0.9,
    vision_seconds=0.8,
    vision_wait_seconds=0.01,
    decoded_per_second=900.0,
    decode_queue=2.0,
    pictures=300,
    padding_share=0.05,
    peak_memory_gib=71.25,
    asks_to_stop=False,
    has_failed_save=False,
)


def step_metrics(**changes: Any) -> StepMetrics:
    """Return plausible metrics of a large run, with these changed."""
    return replace(_STEP, **changes)
