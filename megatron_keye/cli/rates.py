# SPDX-License-Identifier: Apache-2.0
"""Measures what a machine reaches, for megatron-keye doctor --rates."""

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_keye.config.backends import DALI_NAMES, installed_version
from megatron_keye.data.video.frame_decoder import make_decoder
from megatron_keye.estimate.prediction.machine import Machine

_SECONDS = 1.0
"""Least time of a measurement, after one run that does not count."""
_SIDE, _CPU_SIDE = 8_192, 1_024
_BYTES, _CPU_BYTES = 2**29, 2**25
"""Of what is copied, gathered from, reduced into, or sent by a rank (an eighth)."""
_GATHERED_ROW, _REDUCED_ROW = 2_048, 512
"""Bytes."""
_CLIP_FRAMES, _CLIP_SIZE = 96, (1_280, 720)


def measure_rates(device: torch.device, num_ranks: int, local_ranks: int) -> dict[str, float]:
    """Return the rates of `Machine` that can be measured here, by field.

    Args:
        device: A GPU or the CPU.
        num_ranks: Ranks of the job, which all call this; of one there are no links to measure.
        local_ranks: Those of this node; where there are others, links between nodes are measured.
    """
    rates = {
        "matmul_tflops": _matmul(device),
        "copy_gigabytes_per_second": _copy(device),
        "gather_gigabytes_per_second": _gather(device),
        "reduce_gigabytes_per_second": _reduce(device),
    }
    if num_ranks > local_ranks:
        rates["between_nodes_gigabytes_per_second"] = _all_to_all(device, num_ranks)
    elif num_ranks > 1:
        rates["all_gather_gigabytes_per_second"] = _all_gather(device, num_ranks)
        rates["all_to_all_gigabytes_per_second"] = _all_to_all(device, num_ranks)
    if device.type == "cuda":
        rates["memory_gibibytes"] = torch.cuda.get_device_properties(device).total_memory / 2**30
        rates["host_gigabytes_per_second"] = _to_device(device)
    # The cores of a node, or the decoders of a GPU, with nobody beside.
    rates["decoded_frames_per_second"] = _decode(device)
    unknown = set(rates) - {f.name for f in dataclasses.fields(Machine)}
    assert not unknown, f"{unknown} are no rates of a machine"
    return rates


def device_title(device: torch.device) -> str:
    """Return the name of a device for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU with {len(os.sched_getaffinity(0))} cores"


def _rate(
    work: float, run: Callable[[], object], device: torch.device, *, together: bool
) -> float:
    """Return work per second of a call, which all ranks repeat as often if it is `together`."""

    def timed(repeats: int) -> float:
        _synchronize(device)
        began = time.perf_counter()
        for _ in range(repeats):
            run()
        _synchronize(device)
        return time.perf_counter() - began

    timed(1)
    seconds = torch.tensor(timed(1), device=device)
    if together:
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    repeats = max(1, round(_SECONDS / max(float(seconds), 1e-6)))
    return work * repeats / timed(repeats)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _size(device: torch.device) -> int:
    return _BYTES if device.type == "cuda" else _CPU_BYTES


def _matmul(device: torch.device) -> float:
    side = _SIDE if device.type == "cuda" else _CPU_SIDE
    matrix = torch.randn(side, side, device=device).bfloat16()
    return _rate(2e-12 * side**3, lambda: matrix @ matrix, device, together=False)


def _copy(device: torch.device) -> float:
    source = torch.zeros(_size(device), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    # Read and written.
    return _rate(2e-9 * len(source), lambda: target.copy_(source), device, together=False)


def _rows(device: torch.device, row_bytes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return rows of so many bytes, and the number of each in a random order."""
    count = _size(device) // row_bytes
    rows = torch.zeros(count, row_bytes // dtype.itemsize, dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(0)
    return rows, torch.randperm(count, generator=generator).to(device)


def _gather(device: torch.device) -> float:
    rows, order = _rows(device, _GATHERED_ROW, torch.bfloat16)
    out = torch.empty_like(rows)
    work = 1e-9 * rows.numel() * rows.itemsize
    return _rate(work, lambda: torch.index_select(rows, 0, order, out=out), device, together=False)


def _reduce(device: torch.device) -> float:
    rows, order = _rows(device, _REDUCED_ROW, torch.float32)
    added = torch.ones_like(rows)
    work = 1e-9 * rows.numel() * rows.itemsize
    return _rate(work, lambda: rows.index_add_(0, order, added), device, together=False)


def _all_gather(device: torch.device, num_ranks: int) -> float:
    own = torch.zeros(_size(device) // 8, dtype=torch.uint8, device=device)
    every = own.new_empty(num_ranks * len(own))
    received = 1e-9 * len(own) * (num_ranks - 1)
    return _rate(received, lambda: dist.all_gather_into_tensor(every, own), device, together=True)


def _all_to_all(device: torch.device, num_ranks: int) -> float:
    part = _size(device) // 8 // num_ranks
    own = torch.zeros(part * num_ranks, dtype=torch.uint8, device=device)
    received = torch.empty_like(own)
    sent = 1e-9 * part * (num_ranks - 1)
    return _rate(sent, lambda: dist.all_to_all_single(received, own), device, together=True)


def _to_device(device: torch.device) -> float:
    source = torch.zeros(_BYTES, dtype=torch.uint8).pin_memory()
    target = torch.empty(_BYTES, dtype=torch.uint8, device=device)
    return _rate(
        1e-9 * _BYTES, lambda: target.copy_(source, non_blocking=True), device, together=False
    )


def _decode(device: torch.device) -> float:
    has_dali = device.type == "cuda" and any(map(installed_version, DALI_NAMES))
    decoder = make_decoder("dali" if has_dali else "pyav", device, 0)
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "clip.mp4"
        make_clip(clip)

        def run() -> None:
            count = sum(1 for _ in decoder.frames(clip, range(_CLIP_FRAMES)))
            assert count == _CLIP_FRAMES, f"got {count} of {_CLIP_FRAMES} frames"

        rate = _rate(_CLIP_FRAMES, run, device, together=False)
        decoder.close()
    return rate


def make_clip(path: Path) -> None:
    """Write a video of moving texture in H.264 at 24 frames per second, a key frame every 24."""
    width, height = _CLIP_SIZE
    texture = np.random.default_rng(0).integers(0, 256, (height // 16, width // 8, 3), np.uint8)
    picture = texture.repeat(16, axis=0).repeat(16, axis=1)
    with av.open(str(path), "w") as target:
        options = {"preset": "ultrafast", "bf": "0", "g": "24"}
        stream = target.add_stream("libx264", rate=24, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(_CLIP_FRAMES):
            shifted = np.ascontiguousarray(picture[:, 4 * number : 4 * number + width])
            frame = av.VideoFrame.from_ndarray(shifted, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 24)
            target.mux(stream.encode(frame))
        target.mux(stream.encode())
