# SPDX-License-Identifier: Apache-2.0
"""The command answers a file line by line, and a chat as it is typed."""

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch.distributed import HashStore

import megatron_keye.recipes
from megatron_keye.checkpoint.history import HISTORY, past_run, text_of
from megatron_keye.cli.generate import parse_arguments
from megatron_keye.cli.generation import generate, make_run
from megatron_keye.config import RunConfig
from megatron_keye.errors import UserError
from megatron_keye.parallel.process import Process
from megatron_keye.recipes import load_recipe
from megatron_keye.rollout.opening import check_attention
from tests.support.clips import BIG_BUCK_BUNNY
from tests.support.ranks import run_on_ranks
from tests.support.tiny import tiny_run
from tests.support.train import train

SMALL = [
    *("model.decoder.hidden_size=16", "model.decoder.num_layers=1", "model.vision.num_layers=1"),
    *("rollout.cache_tokens=2000", "rollout.max_new_tokens=3", "device=cpu"),
]
QUESTION = {"role": "user", "content": "How many?"}
RECORDS = [
    {"messages": [QUESTION, {"role": "assistant", "content": "Two."}]},
    {"messages": [{"role": "user", "content": [{"type": "video", "video": BIG_BUCK_BUNNY}]}]},
]
TYPED = f"""\
/video {BIG_BUCK_BUNNY} 0 1
What is this?
/video nowhere.mp4
And this?
/nonsense
Go on.
"""


def _generate(words: list[str], typed: str = "") -> tuple[str, str]:
    """Run the command's work on the only rank and return what it writes."""
    options = parse_arguments(words)
    process = Process(rank=0, num_ranks=1, device=torch.device("cpu"), store=HashStore())
    out, told = io.StringIO(), io.StringIO()
    streams = redirect_stdout(out), redirect_stderr(told), patch("sys.stdin", io.StringIO(typed))
    with streams[0], streams[1], streams[2]:
        assert generate(make_run(options, 1), process, options)
    return out.getvalue(), told.getvalue()


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the arguments that name a small model with random weights."""
    folder = tmp_path_factory.mktemp("run")
    run = load_recipe("keye_tiny")(num_ranks=1, has_gpu=False).with_overrides(SMALL)
    train(run, [], save_to=folder)
    settings = [word for setting in SMALL for word in ("--set", setting)]
    return ["keye_tiny", "--weights", str(folder / "keye_tiny"), *settings]


def test_a_file_is_answered_line_by_line(words: list[str], tmp_path: Path) -> None:
    questions, out = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    questions.write_text("".join(f"{json.dumps(record)}\n" for record in RECORDS))
    asked = ["--samples", str(questions), "--answers", "2", "--out", str(out)]
    ((_, told),) = run_on_ranks(1, _generate, [*words, *asked])
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    places = {(answer["name"], answer["answer"]) for answer in answers}
    assert places == {(f"{questions}:{line}", n) for line in (1, 2) for n in (0, 1)}
    for answer in answers:
        assert answer["expected"] == ("Two." if answer["name"].endswith(":1") else None)
        assert answer["log_prob"] < 0 and isinstance(answer["text"], str)
    assert f"{sum(answer['num_tokens'] for answer in answers)} tokens in " in told
    assert not list(tmp_path.glob("*.partial"))


def test_a_chat_answers_what_is_typed_and_goes_on_after_mistakes(words: list[str]) -> None:
    ((out, told),) = run_on_ranks(1, _generate, [*words, "--greedy"], TYPED)
    # An answer to each question but that about the file that is not there.
    assert told.count("tokens/s]") == 2
    assert "nowhere.mp4" in told and told.count("/exit") == 2, "help at the start and when lost"
    assert out.count("\n") >= 2


def _refusal(words: list[str]) -> str:
    with pytest.raises(UserError) as error:
        _generate(words)
    return str(error.value)


def test_weights_are_asked_for_unless_a_server_answers() -> None:
    without = ["keye_tiny", "--set", "device=cpu"]
    (refusal,) = run_on_ranks(1, _refusal, without)
    assert refusal.startswith("--weights: got none")
    pytest.importorskip("httpx2", reason="asking a server needs the extra 'served'")
    samples = str(Path(megatron_keye.recipes.__file__).with_name("keye_tiny.jsonl"))
    asked = [*without, "--samples", samples, "--set", "rollout.server=http://127.0.0.1:9"]
    (refusal,) = run_on_ranks(1, _refusal, asked)
    assert refusal.startswith(("rollout.server: http://127.0.0.1:9/generate failed", samples))


@pytest.mark.parametrize(
    ("trained", "asked", "is_refused"),
    [("dense", "sparse", True), ("sparse", "dense", True), ("sparse", "sparse", False)],
)
def test_another_attention_than_that_of_training_is_refused(
    trained: str, asked: str, is_refused: bool, tmp_path: Path
) -> None:
    (tmp_path / HISTORY).write_text(text_of([past_run(_in_phase(trained), 1)]))
    if is_refused:
        with pytest.raises(UserError, match=f"training.phase: got '{asked}'.*checks_hand_over"):
            check_attention(_in_phase(asked), tmp_path)
    else:
        check_attention(_in_phase(asked), tmp_path)


def _in_phase(phase: str) -> RunConfig:
    return tiny_run(training={"phase": phase})
