# SPDX-License-Identifier: Apache-2.0
"""A judge is asked once for each answer, and an answer that it fails on is not scored."""

import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from megatron_keye.config import JudgeConfig, PostTrainingConfig
from megatron_keye.errors import UserError
from megatron_keye.post_training.judge import check_judge
from megatron_keye.post_training.reward import reward
from megatron_keye.post_training.reward_pool import Job, RewardPool
from megatron_keye.scoring.question import Question, user_turn
from megatron_keye.scoring.truth import CaptionTruth, CountTruth

CAPTION = Question(
    id="1",
    task="caption",
    messages=user_turn("a.mp4", "What happens?"),
    truth=CaptionTruth(text="a ball rolls away"),
)


class Server(ThreadingHTTPServer):
    """Replies with a text; keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[Any] = []
        self.reply = "7"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:  # noqa: N802
        self.server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        choice = {"message": {"role": "assistant", "content": self.server.reply}}
        body = json.dumps({"choices": [choice]}).encode()
        self.send_response(200 if self.path == "/v1/chat/completions" else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        """Write nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    pytest.importorskip("httpx2", reason="asking needs the extra 'served'")
    server = Server()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def settings_of(server: Server, folder: Path) -> PostTrainingConfig:
    url = f"http://127.0.0.1:{server.server_port}/"
    judge = JudgeConfig(url=url, model="m", timeout_seconds=5.0, cache_folder=str(folder))
    return PostTrainingConfig(kind="gspo", judge=judge, reward_processes=1)


def test_a_judgement_takes_the_rules_place_and_is_asked_for_once(
    server: Server, tmp_path: Path
) -> None:
    settings = settings_of(server, tmp_path / "judgements")
    answers = ["<think>hm</think>It leaves.", "It leaves.", "It stays."]
    found = [reward(CAPTION, text, "stop", settings) for text in answers]
    assert [each.task for each in found] == [0.7] * 3
    assert [each.judge for each in found] == ["asked", "kept", "asked"]
    assert found[0].total == pytest.approx(0.9 * 0.7 + 0.1)
    content = server.asked[0]["messages"][1]["content"]
    assert all(words in content for words in ("What happens?", "a ball rolls away", "It leaves."))
    assert "hm" not in content and "a.mp4" not in content and len(server.asked) == 2
    # Neither what has an exact rule nor what cannot be read.
    count = replace(CAPTION, task="count", truth=CountTruth(number=2))
    assert reward(count, "2", "stop", settings).judge == "none"
    assert reward(CAPTION, "", "stop", settings).judge == "none" and len(server.asked) == 2


@pytest.mark.parametrize("reply", ["11", "-1", "good", "6 or 7"])
def test_a_reply_that_is_no_number_of_the_scale_is_no_score(
    reply: str, server: Server, tmp_path: Path
) -> None:
    server.reply = reply
    with pytest.raises(UserError, match="expected a number from 0 to 10"):
        reward(CAPTION, "It leaves.", "stop", settings_of(server, tmp_path))
    assert not list(tmp_path.iterdir()), "a judgement that is none is not kept"


def test_an_answer_whose_judge_is_away_is_not_scored(server: Server, tmp_path: Path) -> None:
    settings = settings_of(server, tmp_path)
    away = replace(settings.judge, url=f"{settings.judge.url}nothing/here")
    pool = RewardPool(replace(settings, judge=away))
    try:
        pool.submit(Job(key=(0, 0), question=CAPTION, text="It leaves.", finish="stop"))
        assert pool.collect() == {(0, 0): None}
    finally:
        pool.close()
    assert "nothing/here/v1/chat/completions failed" in pool.failures[0]


def test_a_judge_is_refused_where_it_cannot_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx2", None)
    check_judge(JudgeConfig())
    with pytest.raises(UserError, match=r"post_training\.judge\.url: got no installed httpx2"):
        check_judge(JudgeConfig(url="http://a", model="m"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"url": "http://a"}, "judge.model: got ''"),
        ({"model": "m"}, "judge.model: got 'm'"),
        ({"tasks": ("grounding",)}, "judge.tasks: got 'grounding'"),
        ({"timeout_seconds": 0.0}, "judge.timeout_seconds: got 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        JudgeConfig(**wrong)


def test_a_judge_has_less_time_than_a_reward() -> None:
    with pytest.raises(UserError, match="reward_seconds: got 10"):
        PostTrainingConfig(kind="gspo", judge=JudgeConfig(url="http://a", model="m"))
