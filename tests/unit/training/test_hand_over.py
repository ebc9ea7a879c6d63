# SPDX-License-Identifier: Apache-2.0
"""Which phase may follow which weights, told by the history that checkpoints carry."""

import logging
from pathlib import Path
from typing import Any

import pytest

from megatron_keye.checkpoint.history import (
    HISTORY,
    PastRun,
    past_run,
    read_history,
    released,
    text_of,
)
from megatron_keye.config import CheckpointConfig, RunConfig
from megatron_keye.config.lora import LoraConfig
from megatron_keye.config.training import Phase
from megatron_keye.errors import UserError
from megatron_keye.recipes import load_recipe
from megatron_keye.recipes.stages import CHAINS
from megatron_keye.training import hand_over
from tests.support.tiny import tiny_run


def run_of(phase: Phase, weights: Path | str = "", **training: Any) -> RunConfig:
    checkpoint = CheckpointConfig(weights=str(weights))
    return tiny_run(training={"phase": phase, "checkpoint": checkpoint, **training})


def past(*phases: Phase) -> list[PastRun]:
    return [past_run(run_of(phase), steps=3) for phase in phases]


ALIGNED = past_run(run_of("dense", frozen=("vision", "decoder")), steps=3)
HISTORIES: dict[str, tuple[list[PastRun], set[Phase]]] = {
    "dense": (past("dense"), {"dense", "indexer_warmup"}),
    "projector alone": ([ALIGNED], {"dense", "indexer_warmup"}),
    "warmed up": (past("dense", "indexer_warmup"), {"indexer_warmup", "sparse"}),
    "sparse": (past("dense", "indexer_warmup", "sparse"), {"sparse"}),
    "released": ([released("Keye")], {"sparse"}),
    "released, projector anew": ([released("Keye"), ALIGNED], {"sparse"}),
    "dense once more": (past("indexer_warmup", "dense"), {"dense", "indexer_warmup"}),
}


@pytest.mark.parametrize("name", HISTORIES)
def test_a_phase_follows_only_what_prepared_for_it(name: str, tmp_path: Path) -> None:
    history, sensible = HISTORIES[name]
    (tmp_path / HISTORY).write_text(text_of(history))
    for phase in ("dense", "indexer_warmup", "sparse"):
        run = run_of(phase, tmp_path)
        if phase in sensible:
            assert hand_over.begin(run, rank=0) == history
            continue
        with pytest.raises(
            UserError, match=f"training.phase: got '{phase}' with weights"
        ) as error:
            hand_over.begin(run, rank=1)
        assert history[-1]["run"] in str(error.value)
        meant = run_of(phase, tmp_path, checks_hand_over=False)
        assert hand_over.begin(meant, rank=0) == history


@pytest.mark.parametrize("chain", CHAINS)
def test_every_stage_may_follow_the_one_before(chain: str) -> None:
    history: list[PastRun] = []
    for number, name in enumerate(CHAINS[chain]):
        run = load_recipe(name)(num_ranks=64 if chain == "keye" else 1, has_gpu=False)
        if number:
            hand_over.check_hand_over(run, history)
        history.append(past_run(run, run.training.steps))


def test_a_run_from_random_weights_is_free_but_told_what_stays_random(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert hand_over.begin(run_of("sparse"), rank=0) == []
    assert not caplog.messages
    frozen = run_of("dense", frozen=("vision", "decoder"))
    hand_over.begin(frozen, rank=1)
    assert not caplog.messages
    hand_over.begin(frozen, rank=0)
    assert "vision and decoder: no run has trained these weights" in caplog.messages[0]
    assert caplog.records[0].levelno == logging.WARNING


def test_weights_without_a_history_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert hand_over.begin(run_of("sparse", tmp_path), rank=0) == []
    assert f"has no {HISTORY}" in caplog.messages[0]


@pytest.mark.parametrize("text", ["", "{}x", "[1]", '[{"run": "a"}]', "3"])
def test_a_history_of_another_kind_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / HISTORY).write_text(text)
    with pytest.raises(UserError, match="expected a list of runs with run, phase, steps, trained"):
        read_history(tmp_path)


def test_adapters_do_not_make_random_weights_trained_ones(
    caplog: pytest.LogCaptureFixture,
) -> None:
    hand_over.begin(run_of("dense", lora=LoraConfig(rank=2)), rank=0)
    assert "vision and projector and decoder: no run has trained" in caplog.messages[0]
