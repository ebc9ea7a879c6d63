# SPDX-License-Identifier: Apache-2.0
"""A GPU's trace, written by hand in the profiler's format, goes to the modules it belongs to."""

import gzip
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_keye.errors import UserError
from megatron_keye.profiling.communication import find_exchanges, sum_exchanges
from megatron_keye.profiling.memory import measure_memory
from megatron_keye.profiling.pieces import PYTHON, Piece, find_pieces, place_at
from megatron_keye.profiling.places import Place, find_places
from megatron_keye.profiling.rank_step import summarize, without_waits
from megatron_keye.profiling.trace import Trace, parse_trace, read_trace

MAIN, AUTOGRAD = 1, 2
FORWARD, BACKWARD = "forward", "backward"


class Recording:
    """Events of a step, times in microseconds."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def range(self, name: str, start: float, end: float, thread: int = MAIN) -> None:
        self._add("user_annotation", name, start, end, thread)

    def operator(self, name: str, start: float, end: float, thread: int = MAIN) -> None:
        self._add("cpu_op", name, start, end, thread)

    def launch(self, at: float, kernel: str, start: float, end: float, **how: Any) -> None:
        thread, arguments = how.pop("thread", MAIN), how.pop("arguments", {})
        number = {"correlation": len(self.events)}
        self._add("cuda_runtime", "cudaLaunchKernel", at, at + 1, thread, number)
        on_stream = {"stream": how.get("stream", 7)} | number | arguments
        self._add("kernel", kernel, start, end, on_stream["stream"], on_stream)

    def backward(self, start: float, end: float, forward: float, forward_thread: int) -> None:
        """A node of autograd around an operator, linked to the operator that made it."""
        self.operator("autograd::engine::evaluate_function: Mm", start, end, AUTOGRAD)
        self.operator("MmBackward0", start + 1, end - 1, AUTOGRAD)
        flow = {"cat": "fwdbwd", "name": "fwdbwd", "id": len(self.events)}
        self.events += [
            {"ph": "s", "tid": forward_thread, "ts": forward, **flow},
            {"ph": "f", "tid": AUTOGRAD, "ts": start + 1, "bp": "e", **flow},
        ]

    def memory(self, at: float, num_bytes: int, address: int, thread: int = MAIN) -> None:
        """An allocation of the GPU; 900 bytes are held before the first."""
        held = 900 + sum(e["args"]["Bytes"] for e in self.events if e["name"] == "[memory]")
        found = {"Bytes": num_bytes, "Addr": address, "Total Allocated": held + num_bytes}
        found |= {"Device Type": 1, "Device Id": 0}
        self.events.append(
            {"ph": "i", "cat": "cpu_instant_event", "name": "[memory]", "tid": thread}
            | {"ts": at, "args": found}
        )

    def trace(self) -> Trace:
        return parse_trace(self.events, "step")

    def _add(
        self,
        category: str,
        name: str,
        start: float,
        end: float,
        thread: int,
        arguments: dict[str, Any] | None = None,
    ) -> None:
        self.events.append(
            {"ph": "X", "cat": category, "name": name, "tid": thread, "ts": start}
            | {"dur": end - start, "args": arguments or {}}
        )


def recomputed_step() -> Recording:
    """A layer of experts that is run, run again by a checkpoint, and taken back."""
    recording = Recording()
    recording.range("step", 0, 1000)
    recording.range("forward", 10, 200)
    recording.range("decoder.experts", 20, 100)
    recording.operator("aten::mm", 30, 50)
    recording.launch(40, "gemm", 300, 340)
    recording.operator("aten::add", 110, 120)
    recording.launch(112, "add", 340, 345, stream=9)
    recording.operator("CheckpointFunctionBackward", 400, 600, AUTOGRAD)
    recording.range("decoder.experts", 410, 450, AUTOGRAD)
    recording.operator("aten::mm", 420, 440, AUTOGRAD)
    recording.launch(425, "gemm", 500, 530, thread=AUTOGRAD)
    recording.backward(460, 500, forward=420, forward_thread=AUTOGRAD)
    recording.launch(470, "gemm", 530, 610, thread=AUTOGRAD)
    recording.operator("autograd::engine::evaluate_function: Accumulate", 501, 520, AUTOGRAD)
    recording.launch(505, "add", 610, 615, thread=AUTOGRAD)
    recording.range("optimizer", 700, 900)
    recording.launch(710, "adam", 720, 800)
    return recording


def seconds_by_place(pieces: list[Piece]) -> dict[tuple[str, str], float]:
    sums: dict[tuple[str, str], float] = {}
    for piece in pieces:
        key = piece.place.module, piece.place.in_pass
        sums[key] = round(sums.get(key, 0.0) + piece.seconds * 1e6, 6)
    return sums


def test_a_kernel_belongs_to_the_module_and_pass_that_launched_it() -> None:
    trace = recomputed_step().trace()
    assert seconds_by_place(find_pieces(trace, find_places(trace))) == {
        ("decoder.experts", "forward"): 40,
        ("decoder.other", "forward"): 5,
        ("decoder.experts", "recomputed"): 30,
        # The product, and the sum into the weight's gradient that follows it.
        ("decoder.experts", "backward"): 85,
        ("optimizer", "forward"): 80,
    }


def test_what_names_itself_in_a_backward_pass_stays_there() -> None:
    recording = recomputed_step()
    recording.operator("aten::bmm", 130, 140)
    recording.backward(620, 690, forward=130, forward_thread=MAIN)
    recording.range("sparse_indexer_loss", 630, 680, AUTOGRAD)
    recording.launch(640, "teach", 820, 830, thread=AUTOGRAD)
    trace = recording.trace()
    (taught,) = (p for p in find_pieces(trace, find_places(trace)) if p.name == "teach")
    assert taught.place == Place("decoder.indexer.loss", "backward")


def test_exchanges_are_no_work_of_modules_and_are_exposed_where_nothing_computes() -> None:
    recording = recomputed_step()
    sizes = {"In msg nelems": 10, "Out msg nelems": 40, "dtype": "BFloat16"}
    recording.launch(
        45,
        "ncclDevKernel_AllGather",
        330,
        360,
        stream=20,
        arguments=sizes | {"Collective name": "_allgather_base"},
    )
    trace = recording.trace()
    places = find_places(trace)
    pieces = find_pieces(trace, places)
    exchanges = find_exchanges(trace, partial(place_at, trace, places))
    (found,) = sum_exchanges(exchanges, [(piece.start, piece.end) for piece in pieces])
    assert "nccl" not in " ".join(piece.name for piece in pieces)
    assert (found.kind, found.module, found.num_bytes) == (
        "allgather_base",
        "decoder.experts",
        80,
    )
    assert found.seconds == pytest.approx(30e-6) and found.exposed_seconds == pytest.approx(15e-6)


def test_memory_is_told_by_where_it_is_taken_and_given_back() -> None:
    recording = recomputed_step()
    recording.memory(35, 100, address=1)  # kept for the backward pass
    recording.memory(36, 70, address=2)  # given back in the same pass
    recording.memory(90, -70, address=2)
    recording.memory(472, 30, address=3, thread=AUTOGRAD)
    recording.memory(480, -100, address=1, thread=AUTOGRAD)
    recording.memory(490, -30, address=3, thread=AUTOGRAD)
    recording.memory(720, 11, address=4)
    trace = recording.trace()
    at = partial(place_at, trace, find_places(trace))
    memory = measure_memory(trace, {"weights": 500}, at)
    assert memory.held == {"weights": 500, "optimizer state and rest": 400}
    assert {kind: max(values) for kind, values in memory.kinds.items()} == {
        "activations": 100,
        "working memory": 70,
        "backward pass": 30,
        "optimizer": 11,
    }
    assert memory.kept == {"decoder.experts": 100}
    assert memory.peak == 900 + 170


def test_a_cpu_works_in_its_main_thread_and_waits_in_python() -> None:
    recording = Recording()
    recording.range("step", 0, 100)
    recording.range("decoder.router", 10, 60)
    recording.operator("aten::mm", 20, 30)
    recording.range("gloo:all_reduce", 32, 52, thread=3)
    facts: dict[str, Any] = {"state_bytes": {}}
    step = summarize(recording.trace(), facts)
    assert step.modules["decoder.router", "forward"] == pytest.approx(30e-6)
    assert step.modules["other", "forward"] == pytest.approx(50e-6)
    assert step.exposed_seconds == pytest.approx(20e-6)


def test_waits_are_cut_out_of_what_lies_around_them() -> None:
    here = Place("other", "forward")
    pieces = [
        Piece(PYTHON, here, 0, 10),
        Piece("aten::mm", here, 10, 20),
        Piece("f", here, 20, 30),
    ]
    left = without_waits(pieces, [(-5, 1), (3, 4), (9, 12), (25, 40)])
    assert [(piece.start, piece.end) for piece in left] == [(1, 3), (4, 9), (10, 20), (20, 25)]


@pytest.mark.parametrize("content", [b"", b"{}", gzip.compress(b"[1"), gzip.compress(b"[]")])
def test_a_damaged_trace_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "rank-00000.trace.json.gz"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"rank-00000.*profile the step again"):
        read_trace(file, "step")


def test_a_trace_without_a_step_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "other.json.gz"
    file.write_bytes(gzip.compress(json.dumps({"traceEvents": []}).encode()))
    with pytest.raises(UserError, match="got 0 ranges 'step'"):
        read_trace(file, "step")
