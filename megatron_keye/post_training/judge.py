# SPDX-License-Identifier: Apache-2.0
"""A language model that judges answers, asked by HTTP; what it said is kept on disk.

Interface: OpenAI's chat completions, which vLLM, SGLang and others serve.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from megatron_keye.config.judge import JudgeConfig
from megatron_keye.errors import UserError
from megatron_keye.files.disk import writing
from megatron_keye.rollout.served import import_http_client
from megatron_keye.scoring.question import Question
from megatron_keye.scoring.words import parse_number

_BEST = 10
_INSTRUCTION = f"""You compare an answer to a question about a video with the right answer.
Judge what the answer says, not how it says it. Statements that contradict the right answer, or \
that it does not support, cost as much as what is left out.
Reply with a whole number alone, from 0 (nothing is right) to {_BEST} (all is right)."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What the judge thinks of an answer."""

    value: float
    """0 to 1."""
    was_kept: bool
    """Whether it was known from an earlier time."""


def check_judge(settings: JudgeConfig) -> None:
    """Raise a UserError if a judge is wanted and what asks it is not installed."""
    if settings.url:
        _http()


def judge(question: Question, answer: str, settings: JudgeConfig) -> Judgement:
    """Return what the judge thinks of an answer, from disk if it has judged it before.

    Args:
        question: What was asked, and what is right.
        answer: The model's answer, without its thinking.
        settings: Whom to ask; with a cache folder.

    Raises:
        UserError: When the server fails, or replies with anything but a number from 0 to 10.
    """
    content = {
        "model": settings.model,
        "messages": [
            {"role": "system", "content": _INSTRUCTION},
            {"role": "user", "content": _described(question, answer)},
        ],
        "temperature": 0,
    }
    digest = sha256(json.dumps([settings.url, content], sort_keys=True).encode()).hexdigest()
    kept = Path(settings.cache_folder) / f"{digest}.json"
    if kept.is_file():
        return Judgement(value=json.loads(kept.read_text())["value"], was_kept=True)
    reply = _ask(content, settings)
    found = parse_number(reply)
    if found is None or not 0 <= found <= _BEST:
        raise UserError(
            f"post_training.judge: {settings.model} replied {reply[:200]!r}, expected a number "
            f"from 0 to {_BEST}"
        )
    value = found / _BEST
    _keep(kept, {"value": value, "reply": reply, "asked": content})
    return Judgement(value=value, was_kept=False)


def _described(question: Question, answer: str) -> str:
    """Return question, right answer and answer as the judge reads them."""
    [right] = question.truth.written().values()
    shown = right if isinstance(right, str) else json.dumps(right)
    turns = "\n".join(_text(turn) for turn in question.messages)
    return f"Question:\n{turns}\n\nRight answer:\n{shown}\n\nAnswer to judge:\n{answer}"


def _text(turn: Mapping[str, Any]) -> str:
    """Return the words of a turn, without its media."""
    content = turn["content"]
    if isinstance(content, str):
        return content
    return " ".join(part["text"] for part in content if part.get("type") == "text")


def _ask(content: Mapping[str, Any], settings: JudgeConfig) -> str:
    http = _http()
    url = f"{settings.url.rstrip('/')}/v1/chat/completions"
    try:
        response = http.post(url, json=content, timeout=settings.timeout_seconds)
        response.raise_for_status()
        return str(response.json()["choices"][0]["message"]["content"])
    except (http.HTTPError, http.InvalidURL, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(
            f"post_training.judge.url: {url} failed ({error or type(error).__name__}), expected a "
            "server that answers chat completions; start it, or correct the URL"
        ) from error


def _keep(path: Path, judgement: Mapping[str, Any]) -> None:
    """Write a judgement, whole or not at all: other processes may judge the same answer."""
    with writing(path, "a judgement"):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.part")
        partial.write_text(json.dumps(judgement))
        partial.replace(path)


def _http() -> Any:
    return import_http_client("post_training.judge.url")
