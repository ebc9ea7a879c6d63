# SPDX-License-Identifier: Apache-2.0
"""Times the cases of tools/benchmark_step.py, each beside its peer, and writes their lines."""

import argparse
import gc
import json
import os
import statistics
import sys
import time
import traceback
from collections import Counter
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_keye.config import DecoderParallel, ParallelConfig, RunConfig, VisionParallel
from megatron_keye.config.backends import (
    has_engine_experts,
    transformer_engine_version,
    uses_transformer_engine,
)
from megatron_keye.config.fused_kernels import choose_fusions
from megatron_keye.config.parts import Part
from megatron_keye.estimate.memory import decoder_memory
from megatron_keye.estimate.state import Parameters
from megatron_keye.model import part_of
from megatron_keye.parallel.grid import build_grid
from megatron_keye.parallel.process import resolve_device
from megatron_keye.parallel.random import seed_rank
from tools.benchmark_lines import shared_fields, write_line
from tools.benchmark_step_cases import PEER_RECOMPUTES, Case, compared
from tools.benchmark_step_layers import (
    Stack,
    UnionMeter,
    decoder_row,
    hidden_states,
    our_stack,
    plain_stack,
)
from tools.benchmark_step_profile import profile_step

WARM_UPS = 2
PARTS = ("forward", "backward", "optimizer")


def measure_all(cases: list[Case], options: argparse.Namespace) -> int:
    """Time every case and write its line; return 1 if one failed otherwise than by memory.

    Args:
        cases: What to time, in this order.
        options: Of the command line.

    Raises:
        UserError: For a recipe or settings that do not fit, before anything is timed.
    """
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    device = resolve_device("auto", rank)
    grid = build_grid(ParallelConfig(decoder=DecoderParallel(context=num_ranks, expert=num_ranks)))
    assert grid.decoder is not None, "all ranks have a decoder"
    seed_rank(1, grid)
    bench = Bench(device, grid.decoder, options)
    for case in cases:
        bench.run(case)
    shared = machine_fields(device) | {"ranks": num_ranks}
    lines: list[dict[str, Any]] = []
    peers: dict[Case, dict[str, Any]] = {}

    def write(line: dict[str, Any]) -> None:
        lines.append(line)
        if rank == 0 or "error" in line:
            write_line(line | shared, options.out)

    for case in cases:
        line = bench.line(case, is_plain=False)
        goes_on = num_ranks == 1 or "error" not in line
        if goes_on and not options.no_peer and bench.has_peer(case):
            key = case.peer()
            if key not in peers:
                peers[key] = bench.line(key, is_plain=True)
                write(peers[key])
            if device.type == "cuda":
                line |= compared(line, peers[key])
        write(line)
        if num_ranks > 1 and any("error" in line for line in lines):
            # Others may wait for this rank in an exchange, which taking leave would do as well.
            sys.stdout.flush()
            os._exit(1)
    return int(any(line.get("error", "out of memory") != "out of memory" for line in lines))


def machine_fields(device: torch.device) -> dict[str, Any]:
    """Return the fields that all lines share."""
    return {
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
        "proves_speed": device.type == "cuda",
        "torch": torch.__version__,
        "triton": version("triton"),
        "megatron_core": version("megatron-core"),
        "transformer_engine": transformer_engine_version(),
        **shared_fields("tools.benchmark_step"),
    }


class Bench:
    """Times one case at a time, with all memory of the last one freed."""

    def __init__(
        self, device: torch.device, groups: ProcessGroupCollection, options: argparse.Namespace
    ) -> None:
        """Take the device, its process groups and the options of the command line."""
        self._device, self._groups, self._options = device, groups, options

    def run(self, case: Case) -> RunConfig:
        """Return the run of a case."""
        return case.run(
            self._options.recipe,
            self._options.set,
            layers=self._options.layers,
            has_gpu=self._device.type == "cuda",
            ranks=self._groups.cp.size(),
        )

    def has_peer(self, case: Case) -> bool:
        """Return whether the peer can run.

        Only Transformer Engine's attention packs documents or splits rows, and it cannot split
        rows of documents that are not padded for it; nothing packs answers behind a prompt.
        """
        is_packed, is_split = case.layout == "packed", bool(self._groups.cp.size() > 1)
        if case.layout == "answers" or (is_packed and is_split):
            return False
        return not (is_packed or is_split) or self._device.type == "cuda"

    def line(self, case: Case, *, is_plain: bool) -> dict[str, Any]:
        """Return the fields of one case, of our layers or of the peer's."""
        gc.collect()
        recompute: Any = case.recompute
        if is_plain:
            recompute = ",".join(PEER_RECOMPUTES[case.recompute]) or "none"
        line: dict[str, Any] = {
            "op": "decoder_step",
            "impl": "megatron-core" if is_plain else "megatron-keye",
            "phase": "plain" if is_plain else case.phase,
            "tokens": case.tokens,
            "layers": self._options.layers,
            "layout": case.layout,
            "locality": case.locality,
            "recompute": recompute,
            "keeps_in_host_memory": case.keeps_in_host_memory,
        }
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            line["held_before_mib"] = round(torch.cuda.memory_allocated() / 2**20)
        try:
            return line | self._measured(case, is_plain=is_plain)
        except torch.OutOfMemoryError:
            return line | {"without": case.without, "error": "out of memory"}
        except Exception as error:
            traceback.print_exc()
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            return line | {"without": case.without, "error": what}

    def _measured(self, case: Case, *, is_plain: bool) -> dict[str, Any]:
        on_gpu = self._device.type == "cuda"
        run = self.run(case)
        engine = uses_transformer_engine(run.training, has_gpu=on_gpu)
        fusions = choose_fusions(run.training, has_gpu=on_gpu, uses_transformer_engine=engine)
        hidden_SBD = hidden_states(case, run, self._groups, self._device)
        build = case, run, self._groups, self._device, fusions
        found: dict[str, Any] = {"fusions": fusions.names()}
        if is_plain:
            rotary = not self._options.plain_rotary
            stack = plain_stack(*build, uses_transformer_engine=engine, fuses_rotary=rotary)
            found["linear_layers"] = "transformer_engine" if engine else "megatron"
        else:
            stack = our_stack(*build, uses_transformer_engine=engine)
            by_engine = has_engine_experts(run.training, uses_transformer_engine=engine)
            found["expert_layers"] = "transformer_engine" if by_engine else "torch"
            found["expected_mib"] = round(_expected_bytes(run, stack) / 2**20)
            if case.phase == "sparse":
                meter = UnionMeter()
                stack.module.eval()
                with torch.no_grad():
                    row = decoder_row(case, run, self._groups, self._device, meter)
                    stack.module(hidden_SBD, attention_mask=None, packed_seq_params=row)
                stack.module.train()
                found["union_keys"] = round(meter.union_keys)
        try:
            flops = case.layer_flops(run) / self._groups.cp.size()
            return found | self._timed(case, stack, hidden_SBD, is_plain=is_plain, flops=flops)
        finally:
            stack.let_go()

    def _timed(
        self, case: Case, stack: Stack, hidden_SBD: Tensor, *, is_plain: bool, flops: float
    ) -> dict[str, Any]:
        """Time steps of so many model FLOPs a rank, and profile one more on a GPU."""
        on_gpu = self._device.type == "cuda"
        doutput_SBD = torch.randn_like(hidden_SBD) / case.tokens

        def step() -> list[float]:
            return _step(stack, hidden_SBD, doutput_SBD, on_gpu=on_gpu)

        for _ in range(WARM_UPS):
            step()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        times = [step() for _ in range(self._options.repeats)]
        medians = dict(zip(PARTS, map(statistics.median, zip(*times, strict=True)), strict=True))
        step_ms = statistics.median(map(sum, times))
        found: dict[str, Any] = {f"{name}_ms": round(medians[name], 2) for name in PARTS}
        passes_ms = medians["forward"] + medians["backward"]
        found |= {
            "model_tflop_per_s": round(flops / passes_ms / 1e9, 1),
            "step_ms": round(step_ms, 2),
            "tokens_per_s": round(case.tokens * 1e3 / step_ms),
            "peak_mib": round(torch.cuda.max_memory_allocated() / 2**20) if on_gpu else 0,
        }
        if on_gpu:
            profiled = profile_step(step)
            found["gpu_busy"] = round(min(1.0, profiled.busy_milliseconds / step_ms), 3)
            found["launches"] = profiled.num_launches
            found["communication_ms"] = round(profiled.communication_milliseconds, 2)
            found["exposed_communication"] = round(profiled.exposed_share, 4)
            _write_profile(self._options.profiles, case, is_plain, profiled.kernels)
        return found


def _expected_bytes(run: RunConfig, stack: Stack) -> float:
    """Return what `megatron-keye plan` expects of these layers, without a ViT beside them."""
    counts: Counter[tuple[Part, bool]] = Counter()
    for name, weight in stack.module.named_parameters():
        counts[part_of(name), ".experts." in name] += weight.numel()
    held = [
        Parameters(part=part, is_expert=is_expert, count=count)
        for (part, is_expert), count in counts.items()
    ]
    apart = replace(run.parallel, vision=VisionParallel(placement="dedicated", num_ranks=1))
    alone_run = replace(run, parallel=apart)
    return decoder_memory(alone_run, 0, held, num_labels=0, num_patches=0).total


def _step(stack: Stack, hidden_SBD: Tensor, doutput_SBD: Tensor, *, on_gpu: bool) -> list[float]:
    """Run one step and return the milliseconds of each of PARTS."""
    mark = _mark_on_gpu if on_gpu else time.perf_counter
    hidden_SBD.grad = None
    stack.clear_gradients()
    marks: list[Any] = [mark()]
    output_SBD = stack.run_forward(hidden_SBD)
    marks.append(mark())
    output_SBD.backward(doutput_SBD)
    marks.append(mark())
    stack.update()
    marks.append(mark())
    pairs = list(zip(marks, marks[1:], strict=False))
    if not on_gpu:
        return [(end - start) * 1e3 for start, end in pairs]
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]


def _mark_on_gpu() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _write_profile(
    folder: Path | None, case: Case, is_plain: bool, kernels: list[tuple[str, int, float]]
) -> None:
    """Write the longest kernels of a case, by name."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    parts = [
        "plain" if is_plain else case.phase,
        str(case.tokens),
        case.layout,
        case.locality,
        case.recompute + "_in_host_memory" * case.keeps_in_host_memory,
        f"without_{case.without}" if case.without else "fused",
    ]
    rows = [
        {"kernel": name, "launches": launches, "ms": milliseconds}
        for name, launches, milliseconds in kernels
    ]
    (folder / f"{'-'.join(parts)}.json").write_text(json.dumps(rows, indent=1) + "\n")
