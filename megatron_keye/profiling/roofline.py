# SPDX-License-Identifier: Apache-2.0
"""What a GPU can do at most: the roofline that a module's time is compared with.

A module that executes so many FLOPs and moves at least so many bytes takes no less time than the
longer of the two at the vendor's peaks (Williams et al., CACM 52(4), 2009).
"""

from collections.abc import Iterable, Mapping
from typing import Any

from megatron_keye.estimate.device_peaks import FLOAT32_TFLOPS, MEMORY_TERABYTES, by_device


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
