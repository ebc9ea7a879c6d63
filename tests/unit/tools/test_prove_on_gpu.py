# SPDX-License-Identifier: Apache-2.0
"""Proofs of GPUs run beside each other where they may, and none is left out or left behind."""

import json
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from tools.prove_on_gpu import PROOFS, Proof, _Machine

ROOT = Path(__file__).resolve().parents[3]


def test_every_gpu_test_is_part_of_a_proof() -> None:
    paths = [
        ROOT / word
        for proof in PROOFS
        if not proof.is_benchmark
        for word in proof.what.split()
        if word.startswith("tests/")
    ]
    assert all(path.exists() for path in paths)
    files = [file for file in (ROOT / "tests").rglob("test_*.py") if file != Path(__file__)]
    marked = [file for file in files if "mark.gpu" in file.read_text()]
    assert marked
    assert all(any(file.is_relative_to(path) for path in paths) for file in marked)


def test_names_of_results_differ() -> None:
    assert len({proof.name for proof in PROOFS}) == len(PROOFS)


class Script(Proof):
    """A proof that is a line of the shell."""

    @property
    def name(self) -> str:
        return self.what.split("#")[1]

    def command(self, out: Path) -> list[str]:
        return ["sh", "-c", f"date +%s.%N >{out}/{self.name}.began; {self.what}"]


def run(
    tmp_path: Path,
    proofs: list[Proof],
    *,
    num_gpus: int,
    seconds: float,
    tests_per_gpu: int = 1,
) -> dict[str, str]:
    """Run proofs on a machine of so many GPUs and return their status by name."""
    free = Counter(dict.fromkeys(range(num_gpus), tests_per_gpu))
    machine = _Machine(tmp_path, time.monotonic() + seconds, "a GPU", free)
    machine.run(proofs)
    lines = map(json.loads, (tmp_path / "summary.jsonl").read_text().splitlines())
    return {line["proof"]: line["status"] for line in lines}


def began(tmp_path: Path, name: str) -> float:
    return float((tmp_path / f"{name}.began").read_text())


def test_tests_share_the_machine_and_benchmarks_do_not(tmp_path: Path) -> None:
    proofs: list[Proof] = [
        Script("sleep 0.6; test $CUDA_VISIBLE_DEVICES = 0 #first", 9),
        Script("sleep 0.6; test $CUDA_VISIBLE_DEVICES = 1 #second", 9),
        Script("sleep 0.1; test $CUDA_VISIBLE_DEVICES = 0,1 #both", 9, num_gpus=2),
        Script("exit 3 #alone", 9, is_benchmark=True),
    ]
    status = run(tmp_path, proofs, num_gpus=2, seconds=60)
    assert status == {
        "first": "passed",
        "second": "passed",
        "both": "passed",
        "alone": "failed: status 3",
    }
    times = [began(tmp_path, name) for name in ("first", "second", "both", "alone")]
    assert times[1] - times[0] < 0.5 < times[2] - times[0]
    assert times[3] >= times[2] + 0.1


def test_several_tests_may_share_a_gpu_unless_one_has_to_be_alone(tmp_path: Path) -> None:
    proofs: list[Proof] = [Script(f"sleep 0.6 #{name}", 9) for name in ("a", "b", "c")]
    proofs.append(Script("sleep 0.6 #alone", 9, is_test_alone=True))
    proofs.append(Script("sleep 0.6 #last", 9))
    status = run(tmp_path, proofs, num_gpus=1, seconds=60, tests_per_gpu=2)
    assert set(status.values()) == {"passed"}
    times = [began(tmp_path, name) for name in ("a", "b", "c")]
    assert times[1] - times[0] < 0.5 < times[2] - times[0]
    alone = began(tmp_path, "alone")
    assert all(abs(alone - time) >= 0.6 for time in (*times, began(tmp_path, "last")))


def test_what_takes_too_long_ends_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.prove_on_gpu._SECONDS_TO_TELL", 0.1)  # A shell tells nothing.
    proofs: list[Proof] = [
        Script(f"sleep 71 & echo $! >{tmp_path}/child; wait #slow", 1),
        Script("true #late", 9),
    ]
    status = run(tmp_path, proofs, num_gpus=1, seconds=5)
    assert status == {"late": "not begun: no time", "slow": "killed: over its limit"}
    child = int((tmp_path / "child").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_what_takes_too_long_may_tell_what_it_found(tmp_path: Path) -> None:
    script = tmp_path / "slow.py"
    script.write_text(
        "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('two failed')"
    )
    proofs: list[Proof] = [Script(f"exec {sys.executable} {script} #slow", 2)]
    assert run(tmp_path, proofs, num_gpus=1, seconds=30)["slow"].startswith("killed")
    assert "two failed" in (tmp_path / "slow.log").read_text()


def test_one_that_waits_for_a_gpu_is_not_begun_when_time_is_over(tmp_path: Path) -> None:
    proofs: list[Proof] = [Script("sleep 1.5 #long", 2), Script("true #short", 2)]
    status = run(tmp_path, proofs, num_gpus=1, seconds=3)
    assert status == {"long": "passed", "short": "not begun: no time"}


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.name)
def test_commands_write_where_they_are_told(proof: Proof) -> None:
    words = proof.command(Path("/o"))
    assert words[2] in ("pytest", f"tools.{proof.what.split()[0]}")
    result = f"/o/{proof.name}.{'jsonl' if proof.is_benchmark else 'xml'}"
    assert any(word.endswith(result) for word in words)
