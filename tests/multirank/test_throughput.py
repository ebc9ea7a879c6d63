# SPDX-License-Identifier: Apache-2.0
"""MFU: the account's model FLOPs over a step's time and the peaks of devices."""

import math

import pytest

from megatron_keye.estimate.account import model_flops
from megatron_keye.training.throughput import peak_tflops
from tests.support.tiny import mixed_rows, tiny_run
from tests.support.train import train


def test_peaks_are_known_by_name_and_precision() -> None:
    run = tiny_run(training={"precision": "bf16"})
    for name, peak in {
        "NVIDIA H100 80GB HBM3": 989.4,
        "NVIDIA H100 PCIe": 756.0,
        "NVIDIA H200": 989.4,
        "NVIDIA H20": 148.0,
        "NVIDIA H20-3e": 148.0,
        "NVIDIA A100-SXM4-80GB": 312.0,
    }.items():
        assert peak_tflops(run, name) == peak
    assert math.isnan(peak_tflops(run, "NVIDIA H2000"))
    assert math.isnan(peak_tflops(run, "CPU"))
    assert math.isnan(peak_tflops(tiny_run(), "NVIDIA H200"))
    configured = tiny_run(training={"device_peak_tflops": 5.0})
    assert peak_tflops(configured, "CPU") == 5.0


def test_a_step_reports_its_rate_per_rank() -> None:
    run = tiny_run(data=2, training={"device_peak_tflops": 2.0})
    rows = mixed_rows(0)
    (metrics,) = train(run, [rows]).metrics
    rate = model_flops(run, [row.sizes for row in rows]) / metrics.step_seconds / 2 / 1e12
    assert metrics.tflops_per_device == pytest.approx(rate)
    assert metrics.mfu == pytest.approx(rate / 2.0)
