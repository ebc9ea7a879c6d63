# SPDX-License-Identifier: Apache-2.0
"""wandb gets every step once, in one run over all starts; with a stand-in for the package."""

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_keye.cli import rank
from megatron_keye.config import backends
from megatron_keye.config.run import RunConfig
from megatron_keye.config.training import LoggingConfig
from megatron_keye.errors import UserError
from megatron_keye.training.report import Report
from tests.support.metrics import step_metrics
from tests.support.tiny import tiny_run


class WandbError(Exception):
    """Stands for wandb.errors.Error."""


class Server:
    """Stands for the package and its server: history by step, as the server keeps it."""

    Settings = dict
    errors = SimpleNamespace(Error=WandbError)

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.history: dict[int, dict[str, float]] = {}
        self.exit_codes: list[int] = []
        self.url, self.dir = "https://wandb.example/run", ""

    @property
    def step(self) -> int:
        return max(self.history, default=-1) + 1

    def init(self, **asked: Any) -> "Server":
        self.asked.append(asked)
        self.id = asked["id"] or "made-by-wandb"
        return self

    def log(self, scalars: dict[str, float], step: int) -> None:
        assert step >= max(self.history, default=0), "wandb drops what goes back in time"
        self.history.setdefault(step, {}).update(scalars)

    def finish(self, exit_code: int) -> None:
        self.exit_codes.append(exit_code)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    server = Server()
    monkeypatch.setitem(sys.modules, "wandb", server)  # type: ignore[arg-type]
    return server


def run_in(folder: Path, **logging: Any) -> RunConfig:
    run = dataclasses.replace(tiny_run(), output_dir=str(folder))
    settings = LoggingConfig(wandb_project="keye", **logging)
    return dataclasses.replace(run, training=dataclasses.replace(run.training, logging=settings))


def train(run: RunConfig, first: int, last: int) -> None:
    with Report(run, first, last) as report:
        for step in range(first + 1, last + 1):
            report.show(step, step_metrics(loss=float(10 * first + step)))
            report.show_skipped(step, step, [])
        report.show_validation(last, {"all": {"loss": 1.0}})


def test_a_resumed_run_continues_the_wandb_run(server: Server, tmp_path: Path) -> None:
    run = run_in(tmp_path, wandb_entity="team")
    train(run, 0, 3)
    train(run, 2, 4)
    first, second = server.asked
    assert (first["id"], second["id"]) == (None, "made-by-wandb")
    assert first["resume"] == second["resume"] == "allow"
    assert (first["project"], first["entity"], first["mode"]) == ("keye", "team", "online")
    assert first["config"]["training"]["steps"] == run.training.steps
    # A step that was sent before the crash keeps its figures; none is sent twice.
    assert [(step, of["lm loss"]) for step, of in server.history.items()] == [
        *((step, float(step)) for step in (1, 2, 3)),
        (4, 24.0),
    ]
    assert server.history[4]["data/skipped_samples"] == 4
    assert server.history[4]["validation/all/loss"] == 1.0
    assert server.exit_codes == [0, 0]


def test_a_run_that_fails_is_marked_as_failed(server: Server, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="lost"), Report(run_in(tmp_path), 0, 3):
        raise RuntimeError("lost")
    assert server.exit_codes == [1]


def test_a_missing_login_is_one_sentence(server: Server, tmp_path: Path) -> None:
    def refuse(**_: Any) -> Server:
        raise WandbError("no API key")

    server.init = refuse  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"'keye', but wandb does not begin \(no API key\); run"):
        train(run_in(tmp_path), 0, 1)


def test_a_missing_package_is_refused_before_the_model_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_find", lambda name: None)
    device = SimpleNamespace(type="cpu")
    with pytest.raises(UserError, match=r"wandb_project: got 'keye' where wandb is not installed"):
        rank.train(run_in(tmp_path), SimpleNamespace(rank=0, device=device))  # type: ignore[arg-type]
    backends.check_wandb("")


def test_settings_that_would_have_no_effect_are_refused() -> None:
    with pytest.raises(UserError, match=r"wandb_entity: got 'team', expected '' without"):
        LoggingConfig(wandb_entity="team")
    with pytest.raises(UserError, match=r"wandb_mode: got 'off', expected one of"):
        LoggingConfig(wandb_project="keye", wandb_mode="off")  # type: ignore[arg-type]


def test_the_package_itself_takes_what_is_sent(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run = run_in(tmp_path, wandb_mode="offline")
    train(run, 0, 2)
    run_id = (run.folder / "wandb_run_id.txt").read_text().strip()
    train(run, 2, 3)
    folders = list((run.folder / "wandb").glob(f"offline-run-*-{run_id}"))
    assert len(folders) == 2
    assert all(any(folder.glob("*.wandb")) for folder in folders)
