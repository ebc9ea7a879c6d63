# SPDX-License-Identifier: Apache-2.0
"""A run that learns from its answers goes on as if it had not been stopped, wherever it was."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_keye.checkpoint.convert.native_folder import NativeFolder
from megatron_keye.config import (
    CheckpointConfig,
    HealthConfig,
    PostTrainingConfig,
    RolloutConfig,
    RunConfig,
)
from megatron_keye.errors import UserError
from megatron_keye.parallel.process import Process
from megatron_keye.post_training import rollouts
from megatron_keye.post_training.check_run import check_run
from megatron_keye.post_training.trainer import PolicyTrainer
from megatron_keye.production.word_tokenizer import write_tokenizer
from tests.support.ranks import run_on_ranks
from tests.support.rollout import caches
from tests.support.tiny import tiny_model, tiny_run
from tests.support.train import let_go

STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with questions about text, and a tokenizer of their words."""
    folder = tmp_path_factory.mktemp("policy")
    numbers = ["zero", "one", "two", "three", "four", "five"]
    # As many words as the model knows tokens.
    words = [*numbers, "Say", "times", *(f"w{number}" for number in range(78))]
    write_tokenizer(folder / "tokenizer", words)
    lines = [
        {
            "messages": [{"role": "user", "content": f"Say {word} times"}],
            "task": "count",
            "truth": {"number": number},
        }
        for number, word in enumerate(numbers)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def run_of(folder: Path, name: str, **degrees: int) -> RunConfig:
    # Its tokenizer has these ids in front.
    # Rows of padding, which fill a grid up, count in the balancing loss.
    experts = replace(tiny_model().decoder.experts, balance_loss_weight=0.0)
    model = replace(
        tiny_model(experts=experts),
        vision_start_token_id=3,
        vision_end_token_id=4,
        image_token_id=5,
        video_token_id=6,
    )
    run = tiny_run(model=model, **degrees)
    return replace(
        run,
        name=name,
        output_dir=str(folder / "runs"),
        data=replace(
            run.data,
            samples=str(folder / "questions.jsonl"),
            tokenizer=str(folder / "tokenizer"),
        ),
        training=replace(
            run.training,
            steps=STEPS,
            optimizer=replace(run.training.optimizer, schedule="constant", warmup_steps=0),
            checkpoint=CheckpointConfig(
                resume="auto", asynchronous=False, interval_steps=1, keep=0
            ),
            health=HealthConfig(spike_score=0.0),
            frozen=("vision", "projector", "indexer"),
        ),
        rollout=RolloutConfig(page_tokens=8, cache_tokens=600, max_new_tokens=12),
        post_training=PostTrainingConfig(
            kind="gspo",
            prompts_per_step=4,
            answers_per_prompt=4,
            minibatches=2,
            truncated="scored",
            reward_processes=1,
            replays_routes=True,
        ),
    )


def _train(run_json: str, stops_in_step: int) -> tuple[int, bool]:
    """Train, or stop while the answers of a step are generated; return the steps done."""
    run = RunConfig.from_json(run_json)
    device = torch.device("cpu")
    store = dist.distributed_c10d._get_default_store()
    process = Process(
        rank=dist.get_rank(), num_ranks=dist.get_world_size(), device=device, store=store
    )
    trainer = PolicyTrainer(run, process, uses_transformer_engine=False)
    learning = trainer._parts.learning

    def learn(*arguments: Any) -> Any:
        assert not caches(), "the cache's memory is free while a step learns"
        refit = trainer._parts._refit
        copies = [] if refit is None else [storage.nbytes() for storage, _ in refit._memory]
        assert not any(copies), "and so is that of copies of weights"
        return learning(*arguments)

    trainer._parts.learning = learn
    if stops_in_step:
        rollouts._TOKENS_BETWEEN_LOOKS = 60
        asks = lambda: trainer._parts.engine.version == stops_in_step - 1  # noqa: E731
        trainer._parts.rollouts._is_asked_to_stop = asks
    try:
        trainer.train()
    finally:
        rollouts._TOKENS_BETWEEN_LOOKS = 256
        let_go(trainer._parts.trained.model)
    return trainer._progress.step, trainer.was_stopped


def logs(run: RunConfig) -> list[list[dict[str, Any]]]:
    """Return the lines of each step's log."""
    files = sorted((run.folder / "rollouts").glob("step-*.jsonl"))
    return [[json.loads(line) for line in file.open()] for file in files]


def policy_figures_of(run: RunConfig) -> list[dict[str, float]]:
    """Return the figures of each step."""
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").open()]
    return [line["policy"] for line in lines if "policy" in line]


def losses_of(run: RunConfig) -> list[float]:
    """Return the loss of each step."""
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").open()]
    return [line["loss"] for line in lines if "loss" in line]


def trained(run: RunConfig, stops_in_step: int = 0) -> tuple[int, bool]:
    return run_on_ranks(run.parallel.num_ranks, _train, run.to_json(), stops_in_step)[0]


@pytest.fixture(scope="module")
def whole(folder: Path) -> RunConfig:
    """Return a run that was not stopped."""
    run = run_of(folder, "whole")
    assert trained(run) == (STEPS, False)
    return run


def test_every_answer_is_logged_with_what_it_was_worth(whole: RunConfig) -> None:
    steps = logs(whole)
    assert len(steps) == STEPS
    for number, lines in enumerate(steps, 1):
        assert {line["step"] for line in lines} == {number} and len(lines) % 4 == 0
        assert 16 <= len(lines) <= 32, "at most twice the prompts"
        assert all(line["reward"] is not None for line in lines)
        assert all(0.2 < line["ratio"] < 5 for line in lines if "ratio" in line)
    policy = policy_figures_of(whole)
    assert len(policy) == STEPS and all(
        each["rollout_log_prob_error_max"] < 1e-4 for each in policy
    )
    assert all(each["share_replayed"] == 1 for each in policy)
    for each in policy:
        parts = [each[f"generate_{part}_seconds"] for part in ("vision", "prefill", "decode")]
        assert parts[0] == 0 < min(parts[1:]), "the questions are about text"
        assert sum(parts) < each["generate_seconds"]
    assert any("ratio" in line for lines in steps for line in lines), "something was learned"


@pytest.mark.slow
@pytest.mark.parametrize("stops_in_step", [0, 3], ids=["between steps", "while it answers"])
def test_a_stopped_run_goes_on_as_if_it_was_not(
    folder: Path, whole: RunConfig, stops_in_step: int
) -> None:
    run = run_of(folder, f"stopped{stops_in_step}")
    first = replace(run, training=replace(run.training, stop_after_step=0 if stops_in_step else 2))
    assert trained(first, stops_in_step) == (2, bool(stops_in_step))
    saved = json.loads((run.folder / "checkpoints/step-00000002/progress.json").read_text())
    begun = saved["data"]["begun"]
    assert bool(begun) == bool(stops_in_step)
    if begun:
        assert any(each[-1] is None and each[2] for each in begun), "some are not whole"
    assert trained(run) == (STEPS, False)
    for mine, theirs in zip(logs(run), logs(whole), strict=True):
        for line, other in zip(mine, theirs, strict=True):
            for name in ("text", "reward", "finish", "versions", "advantage"):
                assert line[name] == other[name], (line["step"], name)


def test_questions_that_changed_are_refused(folder: Path, whole: RunConfig) -> None:
    path = folder / "fewer.jsonl"
    path.write_text("".join((folder / "questions.jsonl").open().readlines()[:-1]))
    changed = replace(whole, data=replace(whole.data, samples=str(path)))
    with pytest.raises(AssertionError, match="whose questions differ"):
        trained(changed)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("rollout", {"top_p": 0.9}, "ratios are of the whole law"),
        (
            "rollout",
            {"uses_cuda_graphs": True},
            "expected False with post_training.replays_routes",
        ),
        ("training", {"phase": "indexer_warmup", "frozen": ()}, "'dense' or 'sparse'"),
        ("data", {"on_bad_sample": "skip"}, "expected 'refuse' with post_training.kind"),
        ("data", {"samples": "a=0.5,b=0.5"}, "one file of questions"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    folder: Path, section: str, change: dict[str, Any], message: str
) -> None:
    run = run_of(folder, "refused")
    changed = replace(run, **{section: replace(getattr(run, section), **change)})
    with pytest.raises(UserError, match=message):
        check_run(changed)


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["data", "pipeline"])
def test_two_ranks_answer_and_learn_as_one(folder: Path, whole: RunConfig, axis: str) -> None:
    """Stages are replicas while they answer."""
    run = run_of(folder, f"two {axis}", **{axis: 2})
    trained(replace(run, training=replace(run.training, stop_after_step=2)))
    for mine, theirs in zip(losses_of(run), losses_of(whole), strict=False):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    figures = policy_figures_of(run)
    assert (figures[0].get("refit_bytes", 0) > 0) == (axis == "pipeline")
    for mine, theirs in zip(figures, policy_figures_of(whole), strict=False):
        assert mine["reward"] == theirs["reward"]
        assert mine["rollout_log_prob_error_max"] < 1e-4, "the weights are those that learned"
    for mine, theirs in zip(logs(run), logs(whole)[:2], strict=True):
        assert [line["text"] for line in mine] == [line["text"] for line in theirs]
        for line, other in zip(mine, theirs, strict=True):
            assert line["reward"] == other["reward"]
            ratios = [each.get("ratio", 0.0) for each in (line, other)]
            assert ratios[0] == pytest.approx(ratios[1], rel=1e-4)


def test_frozen_parts_stay_as_they_were_bit_for_bit(whole: RunConfig) -> None:
    folders = [NativeFolder(whole.folder / f"checkpoints/step-{step:08d}") for step in (1, STEPS)]
    before, after = ({key: folder.read(key, ()) for key in folder.tensors} for folder in folders)
    changed = {key for key, weight in before.items() if not torch.equal(weight, after[key])}
    frozen = {key for key in before if key.startswith("vision.") or ".indexer." in key}
    assert len(frozen) > 20 and any(key.startswith("vision.projector.") for key in frozen)
    assert changed and not changed & frozen
