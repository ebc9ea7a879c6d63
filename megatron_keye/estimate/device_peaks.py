# SPDX-License-Identifier: Apache-2.0
"""What GPUs can do at most, from NVIDIA's data sheets, by prefix of CUDA's device name."""

import math
from collections.abc import Mapping

BFLOAT16_TFLOPS = {
    "NVIDIA A100": 312.0,
    "NVIDIA A800": 312.0,
    "NVIDIA H20": 148.0,
    "NVIDIA H100": 989.4,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 NVL": 835.0,
    "NVIDIA H200": 989.4,
    "NVIDIA H200 NVL": 835.0,
    "NVIDIA H800": 989.4,
    "NVIDIA B200": 2250.0,
    "NVIDIA GB200": 2500.0,
}
"""Dense bf16 in TFLOP/s."""
FLOAT32_TFLOPS = {
    "NVIDIA A100": 19.5,
    "NVIDIA A800": 19.5,
    "NVIDIA H20": 44.0,
    "NVIDIA H100": 66.9,
    "NVIDIA H100 PCIe": 51.2,
    "NVIDIA H100 NVL": 60.0,
    "NVIDIA H200": 66.9,
    "NVIDIA H800": 66.9,
    "NVIDIA B200": 75.0,
    "NVIDIA GB200": 80.0,
}
"""Float32 in TFLOP/s without TF32, which this package turns off."""
MEMORY_TERABYTES = {
    "NVIDIA A100-SXM4-40GB": 1.555,
    "NVIDIA A100-PCIE-40GB": 1.555,
    "NVIDIA A100-SXM4-80GB": 2.039,
    "NVIDIA A100 80GB PCIe": 1.935,
    "NVIDIA A800-SXM4-80GB": 2.039,
    "NVIDIA H20": 4.0,
    "NVIDIA H100": 3.35,
    "NVIDIA H100 PCIe": 2.0,
    "NVIDIA H100 NVL": 3.9,
    "NVIDIA H200": 4.8,
    "NVIDIA H800": 3.35,
    "NVIDIA B200": 8.0,
    "NVIDIA GB200": 8.0,
}
"""Memory in TB/s."""


def by_device(table: Mapping[str, float], device_name: str) -> float:
    """Return a device's value by the longest prefix of its name; NaN if there is none."""
    known = [name for name in table if f"{device_name} ".startswith((f"{name} ", f"{name}-"))]
    return table[max(known, key=len)] if known else math.nan
