# SPDX-License-Identifier: Apache-2.0
"""The walk over stages: in order, from the last one's weights, and on from where it stopped."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_keye.checkpoint.history import HISTORY, past_run, read_history, text_of
from megatron_keye.checkpoint.manifest import write_manifest
from megatron_keye.cli import local, run_stages, train
from megatron_keye.cli.arguments import chosen_run
from megatron_keye.recipes.stages import CHAINS, STAGES

NAMES = [stage.name for stage in STAGES]


class FakeTraining:
    """Stands for `local.launch`: leaves a stage's folder as training does."""

    def __init__(self) -> None:
        self.trained: list[tuple[str, str]] = []
        """Recipe and weights of each call."""
        self.stops: dict[str, int] = {}
        """Stages that stop after a step, with status 143."""

    def launch(self, command: list[str], num_ranks: int) -> int:
        assert command[1:4] == ["-m", "megatron_keye", "train"]
        options = train.parse_arguments(command[4:])
        run = chosen_run(options, num_ranks=num_ranks, has_gpu=False)
        assert run.training.checkpoint.resume == "auto" and options.ranks == num_ranks
        weights = run.training.checkpoint.weights
        self.trained.append((run.name, weights))
        step = self.stops.pop(run.name, run.training.steps)
        folder = run.folder / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        history = [*(read_history(Path(weights)) or []), past_run(run, step)]
        (folder / HISTORY).write_text(text_of(history))
        write_manifest(folder, {})
        steps = [
            {"step": n, "loss": 3.0 / n, "indexer_kl": None, "indexer_recall": None}
            for n in range(1, step + 1)
        ]
        lines = [json.dumps(line) + "\n" for line in [*steps, {"step": 1, "validation": {}}]]
        (run.folder / "metrics.jsonl").write_text("".join(lines) + '{"step": 3, "lo')
        return 143 if step < run.training.steps else 0


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> FakeTraining:
    fake = FakeTraining()
    monkeypatch.setattr(local, "launch", fake.launch)
    monkeypatch.setattr(local, "count_gpus", lambda: 0)
    return fake


@pytest.fixture
def walk(training: FakeTraining, tmp_path: Path) -> Callable[..., int]:
    """Return a call of the command that trains two steps a stage."""
    settings = ["--set", f"output_dir={tmp_path}", "--set", "training.steps=2", "--ranks", "1"]
    # Before the settings, so that a test can set others.
    return lambda *words: run_stages.main(["keye_tiny", *settings, *words])


def last(folder: Path, name: str, step: int = 2) -> str:
    return str(folder / f"keye_tiny_{name}" / "checkpoints" / f"step-{step:08d}")


def test_each_stage_starts_from_the_last_checkpoint_of_the_one_before(
    walk: Callable[..., int], training: FakeTraining, tmp_path: Path
) -> None:
    assert walk() == 0
    weights = ["", *(last(tmp_path, name) for name in NAMES[:-1])]
    assert training.trained == list(zip(CHAINS["keye_tiny"], weights, strict=True))
    picture = (tmp_path / "keye_tiny_stages.svg").read_text()
    assert all(f">{name}</text>" in picture for name in NAMES)
    assert picture.count("<polyline") == len(NAMES), "a loss each, and no KL that is not a number"
    assert walk() == 0
    assert len(training.trained) == len(NAMES), "all was done"


def test_a_stopped_stage_ends_the_walk_and_the_next_call_goes_on_with_it(
    walk: Callable[..., int],
    training: FakeTraining,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    training.stops["keye_tiny_stage1"] = 1
    assert walk() == 143
    assert [name for name, _ in training.trained] == ["keye_tiny_stage0", "keye_tiny_stage1"]
    out, err = capfd.readouterr()
    assert "keye_tiny_stage1 has stopped; the same command goes on with it" in err
    rows = [" ".join(line.split()) for line in out.splitlines()]
    assert "stage0 projector 384 2 of 2 1.5 - -" in rows
    assert "stage1 all 384 1 of 2 3 - -" in rows and "stage2 all 384 0 of 2 - - -" in rows
    assert walk("--to", "stage2") == 0
    names = [name.removeprefix("keye_tiny_") for name, _ in training.trained]
    assert names == ["stage0", "stage1", "stage1", "stage2"]


def test_a_stage_that_began_from_other_weights_is_not_taken_for_this_walks(
    walk: Callable[..., int],
    training: FakeTraining,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert walk("--to", "stage1") == 0
    assert walk("--set", "training.steps=3") == 2
    message = capsys.readouterr().err
    assert "began from step 2 of keye_tiny_stage0, expected step 3 of keye_tiny_stage0" in message
    assert len(training.trained) == 2, "told before anything is trained"


def test_a_walk_may_begin_later(
    walk: Callable[..., int],
    training: FakeTraining,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert walk("--from", "stage3") == 2
    assert "expected that keye_tiny_stage2 is done" in capsys.readouterr().err
    assert walk("--from", "sft", "--weights", "released") == 0
    assert training.trained == [("keye_tiny_sft", "released")]
    assert walk("--to", "stage0") == 0 and walk("--from", "stage1", "--to", "stage1") == 0
    assert training.trained[-1] == ("keye_tiny_stage1", last(tmp_path, "stage0"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--from", "sft", "--to", "stage1"], "--to: got 'stage1', expected 'sft' or a later"),
        (["--set", "name=x"], "--set: got 'name=x', expected another setting"),
        (["--set", "training.checkpoint.weights=x"], "use --weights"),
        (["--set", "training.checkpoint.resume=none"], "goes on from its newest checkpoint"),
        (["--set", "training.step=1"], "training.step: no such field"),
        (
            ["--set", "parallel.decoder.tensor=2"],
            "--ranks: got 1, expected 2 for keye_tiny_stage0",
        ),
    ],
)
def test_what_is_not_the_users_to_set_is_refused(
    words: list[str],
    message: str,
    walk: Callable[..., int],
    training: FakeTraining,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert walk(*words) == 2
    assert message in capsys.readouterr().err
    assert not training.trained


def test_the_full_model_is_printed_as_jobs_that_wait_for_each_other(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["--print", "--weights", "my start", "--set", "output_dir=out", "--sbatch=--time=9"]
    assert run_stages.main(["keye", *words]) == 0
    script = capsys.readouterr().out
    submit = 'printf "%s\\n" "sbatch $*" >>calls; echo $((41 + $(wc -l <calls)))'
    (tmp_path / "sbatch").write_text(f"#!/bin/sh\n{submit}\n")
    (tmp_path / "sbatch").chmod(0o755)
    subprocess.run(
        ["bash", "-c", script], check=True, cwd=tmp_path, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}
    )
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == len(NAMES)
    assert "--nodes=8 --gpus-per-node=8 --time=9 launch/slurm.sbatch keye_stage0" in calls[0]
    assert "weights=my start" in calls[0] and "--dependency" not in calls[0]
    for number, call in enumerate(calls[1:], start=1):
        assert f"--dependency=afterok:{41 + number} " in call
        assert f"training.checkpoint.weights=out/keye_{NAMES[number - 1]}/checkpoints/" in call


def test_submit_hands_the_jobs_to_slurm(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    assert run_stages.main(["keye", "--submit"]) == 2
    assert "sbatch is not found" in capfd.readouterr().err
    (tmp_path / "sbatch").write_text(f'#!/bin/sh\necho "$*" >>{tmp_path}/calls; echo 42\n')
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert run_stages.main(["keye", "--submit"]) == 2
    assert "expected the repository" in capfd.readouterr().err
    monkeypatch.chdir(Path(__file__).parents[3])
    assert run_stages.main(["keye", "--submit", "--sbatch=--array=1-9%1"]) == 0
    assert f"keye_{NAMES[0]}: job 42\n" in capfd.readouterr().out
    assert (tmp_path / "calls").read_text().count("--array=1-9%1 launch/slurm.sbatch") == len(
        NAMES
    )


def test_nodes_must_be_full(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_stages.main(["keye", "--print", "--gpus-per-node", "7"]) == 2
    assert "expected a divisor of the 64 ranks" in capsys.readouterr().err
