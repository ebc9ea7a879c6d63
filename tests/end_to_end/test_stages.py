# SPDX-License-Identifier: Apache-2.0
"""All seven tiny stages as a user walks them, stopped on the way: who learns, and from what."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_keye.checkpoint.convert.native_folder import NativeFolder
from megatron_keye.checkpoint.history import read_history
from megatron_keye.checkpoint.state import weight_state
from megatron_keye.config import RunConfig
from megatron_keye.config.parts import Part
from megatron_keye.parallel.process import Process
from megatron_keye.recipes.stages import CHAINS
from megatron_keye.training.trainer import Trainer
from tests.support.ranks import run_on_ranks
from tests.support.train import let_go, owned_weights

pytestmark = pytest.mark.slow
STAGES = CHAINS["keye_tiny"]
STOPPED = "keye_tiny_stage1"
WALK_SECONDS = 360


class Walk:
    """A walk whose second stage was stopped by TERM, and the call that went on with it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        words = ["run_stages", "keye_tiny", "--ranks", "1"]
        settings = ["--set", f"output_dir={folder}", "--set", "device=cpu"]
        self._command = [sys.executable, "-m", "megatron_keye", *words, *settings]
        self._environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        self.first, self.first_status = self._stop_in_second_stage()
        done = self._run()
        self.second, self.second_status = done.stdout, done.returncode

    def checkpoint(self, name: str) -> Path:
        return max((self.folder / name / "checkpoints").iterdir())

    def _run(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self._command,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=WALK_SECONDS,
            check=False,
        )

    def _stop_in_second_stage(self) -> tuple[str, int]:
        process = subprocess.Popen(
            self._command, env=self._environment, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if STOPPED in lines[-1]:
                break
        for line in process.stdout:
            lines.append(line)
            if line.startswith("step 2/"):
                process.send_signal(signal.SIGTERM)
        return "".join(lines), process.wait()


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walk]:
    yield Walk(tmp_path_factory.mktemp("walk"))


def test_a_stopped_walk_saves_and_goes_on_within_its_stage(walk: Walk) -> None:
    assert (walk.first_status, walk.second_status) == (143, 0), walk.first + walk.second
    stopped = int(re.findall(r"stopped after step (\d) of 8 by SIGTERM", walk.first)[0])
    assert re.findall(r"stage \d of 7: (\w+)", walk.first) == list(STAGES[:2])
    assert re.findall(r"stage \d of 7: (\w+)", walk.second) == list(STAGES[1:])
    steps = [int(step) for step in re.findall(r"^step (\d)/8 ", walk.second, re.MULTILINE)]
    assert steps == [*range(stopped + 1, 9), *list(range(1, 9)) * 5]
    history = read_history(walk.checkpoint(STAGES[-1]))
    assert history is not None
    assert [(past["run"], past["steps"]) for past in history] == [(name, 8) for name in STAGES]
    picture = (walk.folder / "keye_tiny_stages.svg").read_text()
    assert picture.count("<polyline") == 7 + 3 + 2, "loss; KL; recall of sparse attention"


def test_exactly_the_parts_of_a_stage_learn(walk: Walk) -> None:
    for before, name in zip(STAGES, STAGES[1:], strict=False):
        trained = set(RunConfig.from_json(run_json(walk, name)).training.trained_parts)
        assert moved(walk.checkpoint(before), walk.checkpoint(name)) == trained, name


def test_the_first_stage_moves_the_projector_alone(walk: Walk) -> None:
    run = replace(
        RunConfig.from_json(run_json(walk, STAGES[0])), output_dir=str(walk.folder / "x")
    )
    [differing] = run_on_ranks(1, differing_at_start, run.to_json(), walk.checkpoint(STAGES[0]))
    assert {part_of(name) for name in differing} == {"projector"}


@pytest.mark.parametrize(("before", "name"), list(zip(STAGES, STAGES[1:], strict=False)))
def test_a_stage_begins_with_the_last_ones_weights_bit_for_bit(
    before: str, name: str, walk: Walk
) -> None:
    run = replace(RunConfig.from_json(run_json(walk, name)), output_dir=str(walk.folder / "x"))
    assert run.training.checkpoint.weights == str(walk.checkpoint(before))
    [differing] = run_on_ranks(1, differing_at_start, run.to_json(), walk.checkpoint(before))
    assert differing == []


def run_json(walk: Walk, name: str) -> str:
    return (walk.folder / name / "run.json").read_text()


def part_of(key: str) -> Part:
    if "indexer" in key:
        return "indexer"
    if key.startswith("decoder."):
        return "decoder"
    return "projector" if key.startswith("vision.projector.") else "vision"


def moved(before: Path, after: Path) -> set[Part]:
    """Return the parts that have changed; a part's tensors change all, or none does."""
    folders = NativeFolder(before), NativeFolder(after)
    changes: dict[Part, set[str]] = {}
    kept: dict[Part, set[str]] = {}
    for key in folders[0].tensors:
        first, second = (folder.read(key, ()) for folder in folders)
        (kept if torch.equal(first, second) else changes).setdefault(part_of(key), set()).add(key)
    for part in changes.keys() & kept.keys():
        raise AssertionError(f"{part}: {sorted(kept[part])} did not move, others did")
    return set(changes)


def differing_at_start(text: str, expected: Path) -> list[str]:
    """Build a run as training does, on this rank, and compare its weights with a checkpoint's."""
    run = RunConfig.from_json(text)
    run = run.with_overrides(["training.checkpoint.resume=none"])
    store = torch.distributed.HashStore()
    process = Process(rank=0, num_ranks=1, device=torch.device("cpu"), store=store)
    trainer = Trainer(run, process, uses_transformer_engine=False)
    native, differing = NativeFolder(expected), []
    trained = trainer._trained
    for key, _, offset, shard in owned_weights(weight_state(trained.model, trained.grid)):
        ranges = zip(offset, shard.shape, strict=True)
        region = tuple(slice(start, start + size) for start, size in ranges)
        if not torch.equal(native.read(key, ())[region], shard):
            differing.append(key)
    trainer._ahead.close()
    trained.close()
    let_go(trained.model)
    return differing
