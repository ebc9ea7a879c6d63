# SPDX-License-Identifier: Apache-2.0
"""The trainer's loop without a model: bad samples, waits, epochs, validations, the end."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_keye.checkpoint.folders import checkpoint_folder
from megatron_keye.checkpoint.training_checkpoint import Progress
from megatron_keye.config import DataConfig, RunConfig
from megatron_keye.config.evaluation import EvaluationConfig
from megatron_keye.config.training import ValidationConfig
from megatron_keye.data.loader import RowLoader
from megatron_keye.data.row import PackedRow
from megatron_keye.errors import UserError
from megatron_keye.training.health.run_health import RunHealth
from megatron_keye.training.metrics import MeanLosses
from megatron_keye.training.periodic_evaluation import PeriodicEvaluation
from megatron_keye.training.read_ahead import ReadAhead
from megatron_keye.training.step_clock import StepClock
from megatron_keye.training.step_sums import StepSums
from megatron_keye.training.trainer import Trainer
from megatron_keye.training.validation import ValidationResult
from tests.support.clips import tiny_model as model_of_words
from tests.support.metrics import step_metrics
from tests.support.tiny import mixed_rows, tiny_run


class Loader:
    """Returns rows for some steps, each after a while, then raises for a missing file."""

    def __init__(self, num_steps: int, seconds: float = 0.0) -> None:
        self.num_left, self.seconds = num_steps, seconds

    def next_rows(self, count: int) -> list[PackedRow]:
        time.sleep(self.seconds)
        if not self.num_left:
            raise UserError("samples.jsonl:7: gone.mp4 is not there")
        self.num_left -= 1
        return mixed_rows(0)[:count]

    def state_dict(self) -> dict[str, int]:
        return {"num_skipped": 3}

    def take_skipped(self) -> list[str]:
        return []

    def padding_row(self) -> PackedRow:
        return mixed_rows(0)[0]


class Step:
    """Records the steps that ran, and what the clock said of each; one sample does not decode."""

    recorder = None

    def __init__(self, clock: StepClock, seconds: float = 0.0) -> None:
        self.clock, self.seconds = clock, seconds
        self.ran: list[tuple[int, list[PackedRow], int]] = []
        self.times: list[dict[str, float]] = []
        self.damaged = ["samples.jsonl:2: damaged.mp4 does not decode"]

    def announce(self, rows: list[PackedRow]) -> None:
        pass

    def __call__(self, rows: list[PackedRow], number: int, num_steps: int) -> Any:
        time.sleep(self.seconds)
        self.ran.append((number, rows, num_steps))
        self.times.append(self.clock.end_step())
        return step_metrics()


def trainer_without_model(
    run: RunConfig, loader: Any, *, losses: Iterator[float] | None = None, seconds: float = 0.0
) -> Any:
    """Return a trainer of a fake step, with the losses of its validations."""
    trainer = object.__new__(Trainer)
    clock = StepClock()
    step = Step(clock, seconds)
    no_model: Any = None
    fields: dict[str, Any] = {
        "run": run,
        "process": SimpleNamespace(rank=0, device=torch.device("cpu")),
        "clock": clock,
        "step": step,
        "ahead": ReadAhead(run, loader, 0, step.announce),
        "validation": _validation(losses) if losses else None,
        "last_validation": None,
        "progress": Progress(step=0, updates=0, data={}),
        "sums": StepSums(),
        "num_damaged": 0,
        "health": RunHealth(run, no_model, no_model, SimpleNamespace(rank=0)),
        "has_rows": True,
        "saved": [],
        "evaluation": SimpleNamespace(look=lambda *_, **__: None),
        "saving": SimpleNamespace(look=lambda *_, **__: None, wait=lambda _: None),
    }
    vars(trainer).update({f"_{name}": value for name, value in fields.items()})
    trainer.was_stopped = False
    trainer._checkpoints = SimpleNamespace(save=lambda of, _, **__: trainer._saved.append(of.step))
    return trainer


def _validation(losses: Iterator[float]) -> Callable[[], ValidationResult]:
    def validate() -> ValidationResult:
        means = MeanLosses(loss=next(losses), indexer_kl=1.0, indexer_recall=1.0)
        return ValidationResult(by_source={"a": means}, total=means, num_damaged=0)

    return validate


def run_of(num_steps: int, **training: Any) -> RunConfig:
    return tiny_run(training={"steps": num_steps, **training})


def test_a_missing_file_of_the_next_step_ends_the_run_in_its_step() -> None:
    trainer = trainer_without_model(run_of(2), Loader(num_steps=1))
    with pytest.raises(ValueError, match=r"gone\.mp4 is not there"):
        trainer._run_steps(None)
    assert [number for number, _, _ in trainer._step.ran] == [0] and trainer._progress.step == 1


def test_damaged_samples_are_logged_counted_and_saved(caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_without_model(run_of(1), Loader(num_steps=1))
    trainer._run_steps(None)
    assert trainer._progress.data["num_skipped"] == 4 and trainer._saved == [1]
    assert [record.message for record in caplog.records] == [
        "sample skipped: samples.jsonl:2: damaged.mp4 does not decode"
    ]


def test_slow_rows_are_hidden_behind_a_longer_step_and_seen_behind_a_shorter_one() -> None:
    slow = 0.2
    for step_seconds, waits in ((2 * slow, False), (0.0, True)):
        loader = Loader(num_steps=3, seconds=slow)
        trainer = trainer_without_model(run_of(3), loader, seconds=step_seconds)
        trainer._run_steps(None)
        first, *later = trainer._step.times
        assert first["data_wait"] >= 0.9 * slow, "nothing runs beside the first rows"
        for times in later:
            assert (times["data_wait"] >= 0.7 * slow) == waits
            # Nothing is left out of a step's time, whatever it was spent on.
            assert times["step"] >= 0.9 * max(slow, step_seconds)
            assert times["step"] == pytest.approx(times["data_wait"] + step_seconds, abs=slow / 3)


def test_a_validation_is_a_part_of_the_next_step() -> None:
    run = run_of(2, validation=ValidationConfig(interval_steps=1))
    run = replace(run, data=replace(run.data, validation="v.jsonl"))
    trainer = trainer_without_model(run, Loader(num_steps=2), losses=iter([2.0, 1.0]))
    validate = trainer._validation

    def slowly() -> ValidationResult:
        time.sleep(0.1)
        return validate()

    trainer._validation = slowly
    trainer._run_steps(None)
    first, second = trainer._step.times
    assert first["validation"] == 0.0
    assert 0.1 <= second["validation"] <= second["step"]


@pytest.mark.parametrize("replicas", [1, 2])
def test_epochs_end_with_the_last_sample_and_fill_the_last_step(
    tmp_path: Path, replicas: int
) -> None:
    samples, num_samples, epochs = tmp_path / "s.jsonl", 29, 2.0
    lines = [
        {"messages": [{"role": "assistant", "content": "word " * (3 + number % 7)}]}
        for number in range(num_samples)
    ]
    samples.write_text("\n".join(map(json.dumps, lines)))
    run = tiny_run(training={"steps": 0, "epochs": epochs, "rows_per_step": 4}, data=replicas)
    data = DataConfig(samples=str(samples), row_tokens=32, packing_window=3)
    run = replace(run, data=data)
    loader = RowLoader(data, model_of_words(), seed=1, epochs=epochs)
    trainer = trainer_without_model(run, loader)
    trainer._run_steps(None)
    ran = trainer._step.ran
    names = [name for _, rows, _ in ran for row in rows for name in row.sample_names]
    assert sorted(names) == sorted([f"{samples}:{n}" for n in range(1, num_samples + 1)] * 2)
    assert trainer._saved == [len(ran)] and loader.is_exhausted
    assert all(len(rows) == 4 for _, rows, _ in ran[:-1])
    assert len(ran[-1][1]) % replicas == 0
    assert sum(not row.sample_names for row in ran[-1][1]) < replicas
    # The estimate of all steps, by which the learning rate decays, ends at their number.
    assert ran[-1][2] == len(ran)
    assert all(abs(num_steps - len(ran)) <= 2 for _, _, num_steps in ran)


def early_ending_run(tmp_path: Path, **validation: Any) -> RunConfig:
    run = run_of(40)
    training = replace(
        run.training,
        validation=ValidationConfig(**{"interval_steps": 2, "patience": 2, **validation}),
    )
    data = replace(run.data, validation="v.jsonl")
    return replace(run, data=data, training=training, output_dir=str(tmp_path))


def test_a_run_without_progress_ends_with_its_best_step_saved(tmp_path: Path) -> None:
    run = early_ending_run(tmp_path, min_delta=0.1)
    losses = [5.0, 4.0, 3.95, 3.8, float("nan"), 3.75]
    trainer = trainer_without_model(run, Loader(num_steps=40), losses=iter(losses))
    trainer._run_steps(None)
    progress = trainer._progress
    assert (progress.step, progress.best_step, progress.best_loss) == (12, 8, 3.8)
    assert trainer._saved == [2, 4, 8, 12]
    assert "no progress in 2 validations since step 8 with 3.8000" in trainer._note()
    assert str(checkpoint_folder(run, 8)) in trainer._note()
    # Started again, it has ended, unless it may go on for longer.
    assert trainer._is_over()
    trainer._run = early_ending_run(tmp_path, patience=3)
    assert not trainer._is_over()


def test_a_resumed_run_ends_where_the_unbroken_one_does(tmp_path: Path) -> None:
    run, losses = early_ending_run(tmp_path), [5.0, 4.0, 4.5, 4.5]
    unbroken = trainer_without_model(run, Loader(num_steps=40), losses=iter(losses))
    unbroken._run_steps(None)
    for stop in range(1, unbroken._progress.step):
        stopping = replace(run, training=replace(run.training, stop_after_step=stop))
        first = trainer_without_model(stopping, Loader(num_steps=40), losses=iter(losses))
        first._run_steps(None)
        assert first._progress.step == stop
        rest = iter(losses[stop // 2 :])
        second = trainer_without_model(run, Loader(num_steps=40), losses=rest)
        second._progress = first._progress
        second._run_steps(None)
        assert replace(second._progress, data={}) == replace(unbroken._progress, data={})


def test_a_validation_that_a_stop_left_out_comes_first_after_it(tmp_path: Path) -> None:
    run = early_ending_run(tmp_path)
    trainer = trainer_without_model(run, Loader(num_steps=40), losses=iter([5.0, 5.0, 5.0]))
    trainer._progress.step = 2
    trainer._ahead = ReadAhead(run, Loader(num_steps=40), 2, trainer._step.announce)
    trainer._run_steps(None)
    assert trainer._progress.best_step == 2 and trainer._progress.step == 6


def test_questions_that_a_stop_left_out_are_asked_first_after_it() -> None:
    run = run_of(3, evaluation=EvaluationConfig(samples="q", interval_steps=2))
    trainer = trainer_without_model(run, Loader(num_steps=1))
    trainer._progress.step = 2
    trainer._ahead = ReadAhead(run, Loader(num_steps=1), 2, trainer._step.announce)
    asked: list[int] = []

    def evaluate(step: int) -> dict[str, dict[str, float]]:
        asked.append(step)
        return {}

    trainer._evaluation = PeriodicEvaluation(run, trainer._clock, evaluate)
    trainer._run_steps(None)
    assert asked == [2, 3] and trainer._progress.evaluated_step == 3


def test_a_save_counts_in_the_step_that_it_holds_up_and_is_whole_in_one() -> None:
    clock = StepClock()
    with clock.part("save"):
        time.sleep(0.05)
    clock.note_saved(3.0)
    first, second = clock.end_step(), clock.end_step()
    assert 0.05 <= first["save"] <= first["step"] and first["saved"] == 3.0
    assert second["save"] == second["saved"] == 0.0


class Recovering:
    """Health that goes back two steps, once."""

    has_gone_back = False

    def __init__(self, at_step: int) -> None:
        self.at_step, self.saved = at_step, Progress(step=at_step - 2, updates=0, data={})

    def note(self, progress: Progress, metrics: Any, rows: Any, *, is_last: bool) -> bool:
        is_bad = not self.has_gone_back and progress.step == self.at_step
        self.has_gone_back |= is_bad
        return is_bad

    def go_back(self, progress: Progress) -> Progress:
        return replace(self.saved, data=progress.data)


class NumberedRows(Loader):
    """Gives each step's rows a state of their own."""

    num_read = 0

    def next_rows(self, count: int) -> list[PackedRow]:
        self.num_read += 1
        return super().next_rows(count)

    def state_dict(self) -> dict[str, int]:
        return {"num_skipped": 0, "read": self.num_read}


@pytest.mark.parametrize("at_step", [3, 5])
def test_a_run_that_goes_back_repeats_steps_on_the_rows_behind(at_step: int) -> None:
    trainer = trainer_without_model(run_of(5), NumberedRows(num_steps=7))
    trainer._step.damaged = []
    trainer._health = Recovering(at_step)
    trainer._run_steps(None)
    numbers = [number for number, _, _ in trainer._step.ran]
    back = at_step - 2
    assert numbers == [*range(at_step), *range(back, 5)], "the bad step counts as a step too"
    assert trainer._progress.step == 5 and trainer._progress.data["read"] == 7
    assert trainer._saved == [5]


def test_epochs_that_end_with_a_bad_step_leave_nothing_to_go_on_with() -> None:
    class Ending(NumberedRows):
        share_done = 1.0

        @property
        def is_exhausted(self) -> bool:
            return not self.num_left

    run = tiny_run(training={"steps": 0, "epochs": 1.0})
    for at_step, num_steps in ((3, 1), (2, 1)):
        trainer = trainer_without_model(run, Ending(num_steps=3))
        trainer._health = Recovering(at_step)
        trainer._run_steps(None)
        assert trainer._progress.step == num_steps
        assert trainer._progress.data["read"] == 3
