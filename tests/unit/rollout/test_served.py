# SPDX-License-Identifier: Apache-2.0
"""The client asks a server as SGLang is asked, and says what is wrong with one that is not."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from megatron_keye.errors import UserError
from megatron_keye.rollout.request import NewToken, SamplingLaw
from megatron_keye.rollout.served import ServedEngine
from tests.support.rollout import prompt, request
from tests.support.tiny import VIDEO, tiny_run

pytest.importorskip("httpx2", reason="the client needs the extra 'served'")
STOP = 7


class Stub(ThreadingHTTPServer):
    """Answers with the prompt's last tokens backwards; keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, Any]] = []
        self.reply: Any = None
        """Sent in place of an answer."""
        self.both_are_here = threading.Barrier(2)
        self.waits = False


class Handler(BaseHTTPRequestHandler):
    server: Stub

    def do_POST(self) -> None:  # noqa: N802
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, content))
        if self.server.waits:
            self.server.both_are_here.wait(timeout=10)
        reply = self.server.reply or answer_of(content)
        body = json.dumps(reply).encode()
        self.send_response(200 if self.path in ("/generate", "/flush_cache") else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        """Write nothing."""


def answer_of(content: dict[str, Any]) -> dict[str, Any]:
    if "input_ids" not in content:
        return {}
    count = content["sampling_params"]["max_new_tokens"]
    ids = content["input_ids"][::-1][: count - 1]
    return told([*ids, STOP], "stop")


def told(ids: list[int], finish: str) -> dict[str, Any]:
    pairs = [[-0.5 * n, token, None] for n, token in enumerate(ids)]
    return {"meta_info": {"output_token_logprobs": pairs, "finish_reason": {"type": finish}}}


@contextmanager
def served() -> Iterator[tuple[Stub, ServedEngine]]:
    stub = Stub()
    thread = threading.Thread(target=stub.serve_forever)
    thread.start()
    engine = ServedEngine(
        tiny_run().with_overrides(
            [f"rollout.server=http://127.0.0.1:{stub.server_port}/", "rollout.max_sequences=2"]
        )
    )
    try:
        yield stub, engine
    finally:
        engine.close()
        stub.shutdown()
        stub.server_close()
        thread.join()


ASKED = replace(request(4, prompt(1, 9), num_answers=2), stop_ids=(STOP,))


def test_answers_are_tokens_with_log_probabilities_and_versions() -> None:
    heard: list[NewToken] = []
    with served() as (stub, engine):
        engine.take_weights(3)
        # Both answers are asked for at once, or the stub would wait for ever.
        stub.waits = True
        answers = list(engine.generate([ASKED], heard.append))
    (flushed, _), (path, content), _ = stub.asked
    assert (flushed, path) == ("/flush_cache", "/generate")
    ids = ASKED.prompt.token_ids.tolist()
    assert content["input_ids"] == ids
    assert content["sampling_params"] == {
        **{"temperature": 1.0, "max_new_tokens": ASKED.max_new_tokens, "stop_token_ids": [STOP]}
    }
    assert sorted(answer.answer for answer in answers) == [0, 1]
    for answer in answers:
        assert answer.token_ids == (*ids[::-1][:5], STOP)
        assert answer.log_probs == tuple(-0.5 * n for n in range(6))
        assert (answer.finish, answer.versions) == ("stop", ((3, 6),))
    assert len(heard) == 12


def test_an_answer_ends_before_a_placeholder_of_pictures() -> None:
    with served() as (stub, engine):
        stub.reply = told([3, VIDEO, 5], "length")
        (answer,) = engine.generate([replace(ASKED, num_answers=1)])
    assert (answer.token_ids, answer.finish) == ((3,), "aborted")


@pytest.mark.parametrize(
    ("asked", "reply", "says"),
    [
        (replace(ASKED, prompt=prompt(2, 5, (2, 2))), None, "has 1 pictures"),
        (replace(ASKED, law=SamplingLaw(temperature=0.5)), None, "rollout.temperature: got 0.5"),
        (replace(ASKED, law=SamplingLaw(top_k=3)), None, "top_k 3"),
        (ASKED, {"text": "hello"}, "expected meta_info"),
        (ASKED, told([1, 2], "stop"), r"ends with token \[2\]"),
        (ASKED, told([1, 2], "unheard"), "expected meta_info"),
    ],
)
def test_what_cannot_be_answered_is_refused(asked: Any, reply: Any, says: str) -> None:
    with served() as (stub, engine), pytest.raises(UserError, match=says):
        stub.reply = reply
        list(engine.generate([asked]))


def test_a_server_that_is_not_there_is_named() -> None:
    engine = ServedEngine(tiny_run().with_overrides(["rollout.server=http://127.0.0.1:9"]))
    with pytest.raises(UserError, match=r"http://127.0.0.1:9/generate failed.*start it"):
        list(engine.generate([ASKED]))
