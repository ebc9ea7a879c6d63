"""The trainer and samples that cannot be read or decoded, without a model."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_keye.checkpoint.training_checkpoint import Progress
from megatron_keye.errors import UserError
from megatron_keye.training.trainer import Trainer
from tests.support.metrics import step_metrics
from tests.support.tiny import mixed_rows, tiny_run


class Loader:
    """Returns rows for one step, then raises for a missing file."""

    def __init__(self) -> None:
        self.num_skipped, self._is_exhausted = 3, False

    def next_rows(self, count: int) -> Any:
        if self._is_exhausted:
            raise UserError("samples.jsonl:7: gone.mp4 is not there")
        self._is_exhausted = True
        return mixed_rows(0)[:count]

    def state_dict(self) -> dict[str, int | str]:
        return {"num_skipped": self.num_skipped}


class Step:
    """Records the steps that ran; in each, one sample did not decode."""

    recorder = None

    def __init__(self) -> None:
        self.ran: list[int] = []
        self.damaged = ["samples.jsonl:2: damaged.mp4 does not decode"]

    def announce(self, rows: Any) -> None:
        pass

    def __call__(self, rows: Any, number: int) -> Any:
        self.ran.append(number)
        return step_metrics()


def trainer_without_model() -> Any:
    trainer = object.__new__(Trainer)
    fields: dict[str, Any] = {
        "run": tiny_run(),
        "process": SimpleNamespace(rank=0, device=torch.device("cpu")),
        "loader": Loader(),
        "step": Step(),
        "progress": Progress(step=0, updates=0, data={}),
        "metrics": [],
        "media": set(),
        "upcoming": None,
        "num_damaged": 0,
    }
    vars(trainer).update({f"_{name}": value for name, value in fields.items()})
    return trainer


def test_a_missing_file_of_the_next_step_ends_the_run_in_its_step() -> None:
    trainer = trainer_without_model()
    trainer._train_one(0, is_last=False)
    assert trainer._step.ran == [0] and trainer._progress.step == 1
    with pytest.raises(ValueError, match=r"gone\.mp4 is not there"):
        trainer._train_one(1, is_last=True)
    assert trainer._step.ran == [0]


def test_damaged_samples_are_logged_counted_and_saved(caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_without_model()
    trainer._train_one(0, is_last=True)
    assert trainer._num_skipped() == trainer._progress.data["num_skipped"] == 4
    assert [record.message for record in caplog.records] == [
        "sample skipped: samples.jsonl:2: damaged.mp4 does not decode"
    ]
