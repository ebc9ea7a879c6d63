"""The peak of a device, to which the model FLOPs of a step are compared.

Model FLOPs utilization as in PaLM (arXiv:2204.02311), appendix B.
"""

import math

import torch

from megatron_keye.config.run import RunConfig

PEAK_TFLOPS = {
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
"""Dense bf16 peaks of NVIDIA's data sheets in TFLOP/s, by prefix of CUDA's device name."""


def peak_tflops(run: RunConfig, device_name: str) -> float:
    """Return the peak of one device in TFLOP/s; NaN if unknown.

    Args:
        run: Its `training.device_peak_tflops` takes precedence; the table holds for bf16 only.
        device_name: From `device_name`.
    """
    if run.training.device_peak_tflops:
        return run.training.device_peak_tflops
    known = [
        name for name in PEAK_TFLOPS if f"{device_name} ".startswith((f"{name} ", f"{name}-"))
    ]
    if run.training.precision != "bf16" or not known:
        return math.nan
    return PEAK_TFLOPS[max(known, key=len)]


def device_name(device: torch.device) -> str:
    """Return CUDA's name of a GPU, or "CPU"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
