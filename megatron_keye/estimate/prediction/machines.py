# SPDX-License-Identifier: Apache-2.0
"""The rates of known GPUs, with a source for each number.

"Measured" is by this project. Others are a vendor's peak times what the H100 reaches of its own:
77 % of 989 TFLOP/s, 90 % of 3,350 GB/s, 57 and 76 % of 450 GB/s of NVLink one way.
"""

from dataclasses import replace

from megatron_keye.estimate.device_peaks import (
    BFLOAT16_TFLOPS,
    MEMORY_TERABYTES,
    by_device,
)
from megatron_keye.estimate.prediction.machine import Machine

_ASSUMED = "assumed"
_H100 = "NVIDIA H100"

H100 = Machine(
    name="h100",
    memory_gibibytes=79.1,
    matmul_tflops=766.0,
    copy_gigabytes_per_second=3000.0,
    gather_gigabytes_per_second=1000.0,
    reduce_gigabytes_per_second=1000.0,
    all_gather_gigabytes_per_second=255.0,
    all_to_all_gigabytes_per_second=340.0,
    between_nodes_gigabytes_per_second=40.0,
    host_gigabytes_per_second=40.0,
    decoded_frames_per_second=5665.0,
    sources={
        "memory_gibibytes": "measured: H100 80GB HBM3, as torch sees it",
        "matmul_tflops": "measured: bf16, 8192 x 8192 x 8192, torch 2.11.0+cu130",
        "copy_gigabytes_per_second": "measured: a copy on the device",
        "gather_gigabytes_per_second": "measured: torch's embedding_bag, rows of 2 KiB",
        "reduce_gigabytes_per_second": f"{_ASSUMED}: as much as is gathered",
        "all_gather_gigabytes_per_second": "measured: 537 MB, NCCL, two H200 of a host (NVLink 4)",
        "all_to_all_gigabytes_per_second": "measured: NCCL, two H200 of a host (NVLink 4)",
        "between_nodes_gigabytes_per_second": f"{_ASSUMED}: 80 % of 400 Gbit/s a GPU",
        "host_gigabytes_per_second": f"{_ASSUMED}: 60 % of PCIe 5.0 x16",
        "decoded_frames_per_second": "measured: docs/benchmarks/decode_h100.jsonl, 8 streams",
    },
)


def _scaled(
    name: str,
    *,
    device: str,
    memory_gibibytes: float,
    nvlink: float,
    network: float = 400.0,
    pcie: float = 64.0,
    decoders: int = 7,
) -> Machine:
    """Return a GPU by its data sheet: what the H100 reaches, times the ratio of their peaks.

    Args:
        name: What it is called.
        device: Its name in the tables of peaks.
        memory_gibibytes: Memory.
        nvlink: GB/s one way.
        network: Gbit/s a GPU.
        pcie: GB/s one way.
        decoders: Engines for video.
    """
    peak_tflops = by_device(BFLOAT16_TFLOPS, device)
    memory_bandwidth = by_device(MEMORY_TERABYTES, device) * 1000
    compute, links = peak_tflops / BFLOAT16_TFLOPS[_H100], nvlink / 450.0
    memory = memory_bandwidth / 1000 / MEMORY_TERABYTES[_H100]
    ratios = {
        "matmul_tflops": (compute, f"{peak_tflops:g} TFLOP/s"),
        "copy_gigabytes_per_second": (memory, f"{memory_bandwidth:g} GB/s"),
        # Rows that neighbours share come from the cache, whose rate follows that of products.
        "gather_gigabytes_per_second": (compute, f"{peak_tflops:g} TFLOP/s"),
        "reduce_gigabytes_per_second": (compute, f"{peak_tflops:g} TFLOP/s"),
        "all_gather_gigabytes_per_second": (links, f"NVLink {nvlink:g} GB/s one way"),
        "all_to_all_gigabytes_per_second": (links, f"NVLink {nvlink:g} GB/s one way"),
        "between_nodes_gigabytes_per_second": (network / 400.0, f"{network:g} Gbit/s a GPU"),
        "host_gigabytes_per_second": (pcie / 64.0, f"PCIe {pcie:g} GB/s one way"),
        "decoded_frames_per_second": (decoders / 7, f"{decoders} decoders"),
    }
    sources = {field: f"scaled from the H100: {peak}" for field, (_, peak) in ratios.items()}
    return replace(
        H100,
        name=name,
        memory_gibibytes=memory_gibibytes,
        **{field: getattr(H100, field) * ratio for field, (ratio, _) in ratios.items()},
        sources={"memory_gibibytes": "from the data sheet: less what the driver keeps"} | sources,
    )


MACHINES = {
    machine.name: machine
    for machine in (
        H100,
        _scaled("h200", device="NVIDIA H200", memory_gibibytes=139.8, nvlink=450),
        _scaled("h800", device="NVIDIA H800", memory_gibibytes=79.1, nvlink=200),
        _scaled("h20", device="NVIDIA H20", memory_gibibytes=95.0, nvlink=450),
        _scaled(
            "a100",
            device="NVIDIA A100-SXM4-80GB",
            memory_gibibytes=79.1,
            nvlink=300,
            network=200,
            pcie=32,
            decoders=5,
        ),
        _scaled("b200", device="NVIDIA B200", memory_gibibytes=178.0, nvlink=900),
    )
}
"""By name. The kernels for Hopper's own instructions run on none but h100, h200, h800 and h20:
figures of a100 and b200 say what their memory and links allow, not what was tried."""
