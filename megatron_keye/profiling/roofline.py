"""What a GPU can do at most: the roofline that a module's time is compared with.

A module that executes so many FLOPs and moves at least so many bytes takes no less time than the
longer of the two at the vendor's peaks (Williams et al., CACM 52(4), 2009).
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

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
"""Peak of the memory in TB/s, from NVIDIA's data sheets, by prefix of CUDA's device name."""
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
"""Peak of float32 in TFLOP/s without TF32, which this package turns off; likewise."""


def by_device(table: Mapping[str, float], device_name: str) -> float:
    """Return a device's value by the longest prefix of its name; NaN if there is none."""
    known = [name for name in table if f"{device_name} ".startswith((f"{name} ", f"{name}-"))]
    return table[max(known, key=len)] if known else math.nan


def roofline_seconds(
    works: Iterable[Mapping[str, Any]], device_name: str, peak_tflops: float
) -> float:
    """Return the least time that works take on a device; NaN where its peaks are not known.

    Args:
        works: With "precision", and "executed_flops" and "moved_bytes" by pass.
        device_name: As CUDA has it.
        peak_tflops: Peak of the run's precision, NaN if unknown.
    """
    bandwidth = by_device(MEMORY_TERABYTES, device_name)
    peaks = {"fp32": by_device(FLOAT32_TFLOPS, device_name)}
    seconds = 0.0
    for work in works:
        flops, moved = (float(sum(work[of].values())) for of in ("executed_flops", "moved_bytes"))
        peak = peaks.get(work["precision"], peak_tflops)
        seconds += max(flops / peak, moved / bandwidth) / 1e12
    return seconds
