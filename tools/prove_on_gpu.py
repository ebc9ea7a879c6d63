# SPDX-License-Identifier: Apache-2.0
"""Runs what only GPUs can prove: tests marked gpu side by side, then benchmarks alone.

    python -m tools.prove_on_gpu --out proofs
    python -m tools.prove_on_gpu --out proofs --minutes 9 --only tests/kernels benchmark_step
    python -m tools.prove_on_gpu --tests-per-gpu 4
    python -m tools.prove_on_gpu --list

Tests share the machine, each on GPUs of its own unless --tests-per-gpu lets several share one;
benchmarks begin when the tests have ended, one after the other, since a busy host spoils them.
--minutes bounds the whole: what would not end in time is not begun, and says so. A proof that does
not end within its limit is interrupted, tells what failed so far, and is killed with all that it
started.

The folder gets NAME.log and NAME.xml (tests) or NAME.jsonl (benchmarks), and a line of
summary.jsonl as soon as a proof ends: its command, status, seconds, commit and GPU.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from megatron_keye.cli.arguments import add_count, make_parser
from megatron_keye.cli.status import reports_user_errors
from megatron_keye.errors import UserError
from megatron_keye.files.disk import writing
from tools.benchmark_lines import shared_fields, write_line

_POLL_SECONDS = 0.2
_SECONDS_TO_TELL = 10.0


@dataclass(frozen=True)
class Proof:
    """A command that needs GPUs."""

    what: str
    """Of tests their paths and options, of benchmarks module and options."""
    limit_seconds: int
    """When it is killed; about twice what it takes on an H100."""
    num_gpus: int = 1
    is_benchmark: bool = False
    is_test_alone: bool = False
    """Whether it is a test beside which nothing else may run."""

    @property
    def is_alone(self) -> bool:
        """Whether nothing may run beside it."""
        return self.is_benchmark or self.is_test_alone

    @property
    def name(self) -> str:
        """What its files are called."""
        return re.sub(r"[^a-z0-9]+", "_", self.what.replace(".py", "").removeprefix("tests/"))

    def command(self, out: Path) -> list[str]:
        """Return the command that writes its results into a folder."""
        python = [sys.executable, "-m"]
        if self.is_benchmark:
            module, *options = self.what.split()
            return [*python, f"tools.{module}", *options, "--out", str(out / f"{self.name}.jsonl")]
        options = [
            "-m",
            "gpu",
            "-q",
            "-p",
            "no:cacheprovider",
            f"--junitxml={out}/{self.name}.xml",
        ]
        return [*python, "pytest", *self.what.split(), *options]


PROOFS = (
    # The longest begin first.
    Proof("tests/unit/data", 420),
    Proof(
        "tests/kernels --ignore=tests/kernels/test_sparse_attention_cuda.py "
        "--ignore=tests/kernels/test_sparse_attention_backward_cuda.py",
        300,
    ),
    Proof("tests/kernels/test_sparse_attention_cuda.py", 180),
    # Apart, so that one that breaks the GPU's context leaves the other alone.
    Proof("tests/kernels/test_sparse_attention_backward_cuda.py -k bulk", 120),
    Proof("tests/kernels/test_sparse_attention_backward_cuda.py -k pairs", 120),
    Proof("tests/unit tests/multirank/test_recomputation.py --ignore=tests/unit/data", 240),
    Proof("tests/multirank/test_gpu.py -k four_gpus", 420, num_gpus=4),
    Proof("tests/multirank/test_gpu.py -k not(four_gpus)", 480, num_gpus=2),
    Proof("tests/multirank/test_rollout_gpu.py", 300, num_gpus=4),
    Proof(
        "tests/multirank/test_context.py tests/multirank/test_experts.py "
        "tests/multirank/test_overlapped_sum.py",
        300,
        num_gpus=2,
    ),
    # It looks at what killed processes leave on the machine.
    Proof("tests/multirank/test_faults_gpu.py", 300, num_gpus=2, is_test_alone=True),
    Proof("benchmark_step --all", 400, is_benchmark=True),
    Proof("benchmark_step --all --set training.expert_layers=torch", 400, is_benchmark=True),
    Proof("benchmark_step --all --ranks 2", 240, num_gpus=2, is_benchmark=True),
    Proof("benchmark_optimizer", 120, is_benchmark=True),
    Proof("benchmark_profile_cost", 120, is_benchmark=True),
    Proof("benchmark_generate", 240, is_benchmark=True),
    Proof(
        "benchmark_generate --cases graphs --set training.expert_layers=torch",
        180,
        is_benchmark=True,
    ),
    Proof("benchmark_decode", 300, is_benchmark=True),
)


@dataclass
class _Running:
    proof: Proof
    process: subprocess.Popen[bytes]
    gpus: list[int]
    began: float


@dataclass
class _Machine:
    """Runs proofs on the GPUs of this machine, and notes how each ended."""

    out: Path
    ends_at: float
    gpu: str
    free: Counter[int]
    """How many more tests each GPU takes."""
    running: list[_Running] = field(default_factory=list)
    num_failed: int = 0

    def run(self, waiting: list[Proof]) -> None:
        """Run all proofs that there are GPUs and time for."""
        num_gpus = len(self.free)
        while waiting or self.running:
            for proof in list(waiting):
                if proof.num_gpus > num_gpus:
                    self._note(proof, f"not begun: needs {proof.num_gpus} GPUs", 0.0)
                elif time.monotonic() + proof.limit_seconds > self.ends_at:
                    self._note(proof, "not begun: no time", 0.0)
                elif not self._begins(proof):
                    continue
                waiting.remove(proof)
            for one in list(self.running):
                self._look(one)
            time.sleep(_POLL_SECONDS)

    def _begins(self, proof: Proof) -> bool:
        """Begin a proof if its GPUs are free, and nothing runs that may not be beside it."""
        keeps_apart = proof.is_alone or any(one.proof.is_alone for one in self.running)
        if len(+self.free) < proof.num_gpus or (keeps_apart and self.running):
            return False
        gpus = [gpu for gpu, _ in (+self.free).most_common(proof.num_gpus)]
        self.free.subtract(gpus)
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))}
        with (self.out / f"{proof.name}.log").open("wb") as log:
            process = subprocess.Popen(
                proof.command(self.out),
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                # In the background of a script interrupts are ignored, by whoever is started, too.
                preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
            )
        self.running.append(_Running(proof, process, gpus, time.monotonic()))
        return True

    def _look(self, one: _Running) -> None:
        """Note a proof that has ended, or end one that takes too long."""
        seconds, status = time.monotonic() - one.began, one.process.poll()
        if status is None and seconds < one.proof.limit_seconds:
            return
        if status is None:  # pytest then tells why tests before failed.
            one.process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                one.process.wait(_SECONDS_TO_TELL)
        with suppress(ProcessLookupError):  # Ranks that outlive their test would hold the GPU.
            os.killpg(one.process.pid, signal.SIGKILL)
        one.process.wait()
        self.running.remove(one)
        self.free.update(one.gpus)
        ended = {None: "killed: over its limit", 0: "passed"}
        self._note(one.proof, ended.get(status, f"failed: status {status}"), seconds)

    def _note(self, proof: Proof, status: str, seconds: float) -> None:
        self.num_failed += status != "passed"
        line = {
            "proof": proof.name,
            "status": status,
            "seconds": round(seconds, 1),
            "num_gpus": proof.num_gpus,
            "gpu": self.gpu,
            **shared_fields("tools.prove_on_gpu"),
            "command": " ".join(["python", *proof.command(self.out)[1:]]),
        }
        write_line(line, self.out / "summary.jsonl")


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser("python -m tools.prove_on_gpu", __doc__)
    parser.add_argument("--out", type=Path, default=Path("proofs"), help="default: proofs")
    parser.add_argument("--minutes", type=float, default=60, help="for all of them; default: 60")
    parser.add_argument("--only", nargs="+", help="those whose command contains one of these")
    add_count(parser, "--tests-per-gpu", "so many run side by side", default=1)
    parser.add_argument("--list", action="store_true", help="show the proofs and end")
    return parser.parse_args(arguments)


@reports_user_errors
def main(arguments: Sequence[str]) -> int:
    """Run the proofs; 1 if one did not pass."""
    options = parse_arguments(arguments)
    wanted = options.only or [""]
    proofs = [proof for proof in PROOFS if any(part in proof.what for part in wanted)]
    if not proofs:
        raise UserError(f"--only: got {' '.join(wanted)}, which is part of no proof; see --list")
    if options.list:
        for proof in proofs:
            sys.stdout.write(f"{proof.num_gpus} GPU  {proof.limit_seconds:>4} s  {proof.what}\n")
        return 0
    num_gpus = torch.cuda.device_count()
    if not num_gpus:
        raise UserError("prove_on_gpu: got a machine without a GPU, expected one; see --list")
    with writing(options.out, "the proofs"):
        options.out.mkdir(parents=True, exist_ok=True)
    machine = _Machine(
        options.out,
        time.monotonic() + 60 * options.minutes,
        torch.cuda.get_device_name(),
        Counter(dict.fromkeys(range(num_gpus), options.tests_per_gpu)),
    )
    machine.run(proofs)
    return int(machine.num_failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
