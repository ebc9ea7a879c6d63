# SPDX-License-Identifier: Apache-2.0
"""The peak of a device, to which the model FLOPs of a step are compared.

Model FLOPs utilization as in PaLM (arXiv:2204.02311), appendix B.
"""

import math

import torch

from megatron_keye.config.run import RunConfig
from megatron_keye.estimate.device_peaks import BFLOAT16_TFLOPS, by_device


def peak_tflops(run: RunConfig, device_name: str) -> float:
    """Return the peak of one device in TFLOP/s; NaN if unknown.

    Args:
        run: Its `training.device_peak_tflops` takes precedence; the table holds for bf16 only.
        device_name: From `device_name`.
    """
    if run.training.device_peak_tflops:
        return run.training.device_peak_tflops
    if run.training.precision != "bf16":
        return math.nan
    return by_device(BFLOAT16_TFLOPS, device_name)


def device_name(device: torch.device) -> str:
    """Return CUDA's name of a GPU, or "CPU"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
