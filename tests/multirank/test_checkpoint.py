"""A run that is saved on one grid and loaded on another continues as an unbroken one."""

from pathlib import Path

import pytest

from megatron_keye.checkpoint.folders import find_checkpoint
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


def test_an_incomplete_checkpoint_is_not_found(tmp_path: Path) -> None:
    run = tiny_run().with_overrides([f"output_dir={tmp_path}", "training.checkpoint.resume=auto"])
    checkpoints = run.folder / "checkpoints"
    (checkpoints / "step-00000007.partial").mkdir(parents=True)
    assert find_checkpoint(run) is None
    (checkpoints / "step-00000005").mkdir()
    assert find_checkpoint(run) == checkpoints / "step-00000005"


def test_a_folder_that_is_not_a_checkpoint_is_refused(tmp_path: Path) -> None:
    run = tiny_run().with_overrides([f"training.checkpoint.resume={tmp_path}"])
    with pytest.raises(ValueError, match="expected the folder of a complete checkpoint"):
        find_checkpoint(run)
