"""A run that is saved on one grid and loaded on another continues as an unbroken one."""

from pathlib import Path

import pytest

from megatron_keye.checkpoint.training_checkpoint import find_checkpoint, set_aside
from tests.support.tiny import mixed_rows, tiny_run
from tests.support.train import Trained, assert_same_metrics, train

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


def test_a_fresh_run_moves_earlier_ones_aside(tmp_path: Path) -> None:
    run = tiny_run().with_overrides([f"output_dir={tmp_path}"])
    for number in (1, 2):
        (run.folder / "checkpoints" / f"step-0000000{number}").mkdir(parents=True)
        set_aside(run, rank=1)
        assert run.folder.exists()
        set_aside(run, rank=0)
        assert not run.folder.exists()
        assert (tmp_path / f"tiny.{number}" / "checkpoints" / f"step-0000000{number}").exists()
    set_aside(run, rank=0)
