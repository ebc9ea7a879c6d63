# SPDX-License-Identifier: Apache-2.0
"""While it trains, a model answers on n ranks as on one, and trains on as if it had not."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_keye.config import DecoderParallel, RunConfig
from megatron_keye.data.tokens import load_tokenizer
from megatron_keye.evaluation import Evaluation
from megatron_keye.model import KeyeModel, build_model
from megatron_keye.parallel.grid import build_grid
from megatron_keye.parallel.process import Process
from megatron_keye.parallel.random import seed_rank
from megatron_keye.rollout.request import stop_ids
from tests.support.forged import forge_few, run_on_clips
from tests.support.ranks import run_on_ranks
from tests.support.train import let_go

NO_STORE: Any = None


def _evaluate(run_json: str) -> tuple[Any, bool]:
    """Return the scores, and whether weights, mode and random numbers are as before."""
    run = RunConfig.from_json(run_json)
    grid, device = build_grid(run.parallel), torch.device("cpu")
    seed_rank(run.training.seed, grid)
    model = build_model(run, grid, device, uses_transformer_engine=False)
    _answers_in_words(run, model)
    rank, size = dist.get_rank(), dist.get_world_size()
    evaluation = Evaluation(
        run,
        grid,
        model,
        Process(rank=rank, num_ranks=size, device=device, store=NO_STORE),
        uses_transformer_engine=False,
    )
    modules = model.wrapped()
    before = [weight.clone() for module in modules for weight in module.parameters()]
    state = torch.get_rng_state()
    scores = evaluation(7)
    after = [weight for module in modules for weight in module.parameters()]
    is_as_before = (
        all(map(torch.equal, before, after))
        and all(module.training for module in modules)
        and torch.equal(state, torch.get_rng_state())
    )
    let_go(model)
    return scores, is_as_before


def _answers_in_words(run: RunConfig, model: KeyeModel) -> None:
    """Give tokens that are no words the logit 0: the likeliest word has a larger one.

    What an untrained model draws first is else a matter of its pictures' last bits: most of its
    vocabulary has no text, and a token that ends an answer leaves nothing to compare.
    """
    tokenizer = load_tokenizer(run.data.tokenizer)
    controls = {*stop_ids(tokenizer), *run.model.vision_token_ids}
    ids = range(run.model.decoder.vocab_size)
    silent = [token for token in ids if token in controls or not tokenizer.decode([token])]
    (stage,) = model.stages
    if stage.module.post_process:
        with torch.no_grad():
            stage.module.output_layer.weight[silent] = 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return few forged clips."""
    return forge_few(tmp_path_factory.mktemp("evaluation") / "clips")


@pytest.mark.slow
def test_two_stages_answer_as_one_rank(folder: Path) -> None:
    """They are replicas then, and share the experts."""
    settings = ("training.evaluation.task=", "training.evaluation.max_new_tokens=4")
    settings += ("training.precision=fp64", "model.decoder.experts.balance_loss_weight=0")
    settings += ("model.decoder.num_layers=2",)
    one = run_on_clips(folder, *settings, "training.evaluation.num_questions=3")
    two = replace(
        one,
        name="two",
        parallel=replace(one.parallel, decoder=DecoderParallel(pipeline=2)),
        rollout=replace(one.rollout, expert=2),
    )
    (expected, is_as_before), *_ = run_on_ranks(1, _evaluate, one.to_json())
    assert is_as_before and expected.keys() == {"grounding", "caption"}
    for scores, is_as_before in run_on_ranks(2, _evaluate, two.to_json()):
        assert scores == expected and is_as_before
    texts = [
        [json.loads(line)["text"] for line in (run.folder / "evaluations" / file).open()]
        for run, file in ((one, "step-00000007.jsonl"), (two, "step-00000007.jsonl"))
    ]
    assert texts[0] == texts[1] and len(texts[0]) == 3 and all(texts[0])
