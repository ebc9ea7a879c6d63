# SPDX-License-Identifier: Apache-2.0
"""A run that is saved on one grid and loaded on another continues as an unbroken one."""

from pathlib import Path

import pytest

from megatron_keye.checkpoint.folders import checkpoint_folder
from megatron_keye.checkpoint.manifest import write_manifest
from megatron_keye.checkpoint.selection import choose_checkpoint
from megatron_keye.checkpoint.training_checkpoint import load
from megatron_keye.config import RunConfig
from megatron_keye.errors import UserError
from tests.support.ranks import run_on_ranks
from tests.support.tiny import mixed_rows, tiny_model, tiny_run
from tests.support.train import Trained, assert_same_metrics, build_step, let_go, train

GRIDS = {
    "the same": {"tensor": 2, "expert": 2},
    "one rank": {},
    "pipeline": {"pipeline": 2},
    "interleaved pipeline": {"pipeline": 2, "virtual_stages": 2},
    "context, dedicated vision": {"context": 2, "vision_ranks": 1},
    "data": {"data": 2},
    "shared ends": {"pipeline": 2, "vision_ranks": 1, "shared_micro_batches": 1},
}
SAVED_ON = {"tensor": 2, "expert": 2}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    train(tiny_run(**SAVED_ON), [mixed_rows(0), mixed_rows(1)], save_to=folder)
    return folder / "tiny" / "checkpoints" / "step-00000002"


@pytest.fixture(scope="module")
def reference() -> Trained:
    return train(tiny_run(**SAVED_ON), [mixed_rows(step) for step in range(4)])


@pytest.mark.parametrize("degrees", GRIDS.values(), ids=GRIDS)
def test_training_continues_on_another_grid(
    degrees: dict[str, int], checkpoint: Path, reference: Trained
) -> None:
    rest = [mixed_rows(2), mixed_rows(3)]
    continued = train(tiny_run(**degrees), rest, load_from=checkpoint)
    assert_same_metrics(continued.metrics, reference.metrics[2:])


def test_ranks_that_shared_the_ends_leave_a_checkpoint_for_any_grid(
    tmp_path: Path, reference: Trained
) -> None:
    saved_on = tiny_run(vision_ranks=1, shared_micro_batches=1)
    train(saved_on, [mixed_rows(0), mixed_rows(1)], save_to=tmp_path)
    folder = tmp_path / "tiny" / "checkpoints" / "step-00000002"
    continued = train(tiny_run(tensor=2), [mixed_rows(2), mixed_rows(3)], load_from=folder)
    assert_same_metrics(continued.metrics, reference.metrics[2:])


def test_on_the_same_grid_it_continues_bit_for_bit(checkpoint: Path, reference: Trained) -> None:
    rest = [mixed_rows(2), mixed_rows(3)]
    continued = train(tiny_run(**SAVED_ON), rest, load_from=checkpoint)
    assert not continued.changed(reference)


UNFIT = {
    "phase": (tiny_run(data=2, training={"phase": "dense"}), "training.phase=dense"),
    "precision": (tiny_run(data=2, training={"precision": "bf16"}), "training.precision=bf16"),
    "layers": (tiny_run(data=2, model=tiny_model(num_layers=3)), "num_layers=3"),
}


@pytest.mark.parametrize(("run", "says"), UNFIT.values(), ids=UNFIT)
def test_all_ranks_refuse_what_does_not_fit(run: RunConfig, says: str, checkpoint: Path) -> None:
    refusals = run_on_ranks(2, _refusal, run.to_json(), checkpoint)
    assert len(set(refusals)) == 1 and says in refusals[0]


def _refusal(run_json: str, folder: Path) -> str:
    """Return the error of loading; a rank that raised would have to be restarted."""
    run = RunConfig.from_json(run_json)
    grid, model, optimizer, _ = build_step(run)
    try:
        load(folder, run, model, optimizer, grid)
    except UserError as error:
        return str(error)
    finally:
        let_go(model)
    return "nothing"


def _chosen(runs: list[str]) -> list[Path | None]:
    return [choose_checkpoint(RunConfig.from_json(run)) for run in runs]


def test_a_job_that_starts_again_takes_what_it_saved_and_no_other_runs(tmp_path: Path) -> None:
    def run_of(*settings: str) -> RunConfig:
        return tiny_run().with_overrides([f"output_dir={tmp_path}", *settings])

    def saved(run: RunConfig, step: int) -> Path:
        folder = checkpoint_folder(run, step)
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(run.to_json())
        write_manifest(folder, {})
        return folder

    def chosen(*runs: RunConfig) -> list[Path | None]:
        return run_on_ranks(1, _chosen, [run.to_json() for run in runs])[0]  # type: ignore[no-any-return]

    mine, resume = "training.checkpoint.job=slurm-a-7", "training.checkpoint.resume"
    run, newest = run_of(mine), run_of(mine, f"{resume}=auto")
    earlier = saved(run_of("training.checkpoint.job=slurm-a-6"), 3)
    older = run_of(mine, f"{resume}={earlier}")
    assert chosen(run, newest, older) == [None, earlier, earlier], "lost before its first save"
    own = saved(run, 4)
    assert chosen(run, newest, older) == [own] * 3
    assert chosen(run_of()) == [None], "without a job nothing is continued unasked"
