# SPDX-License-Identifier: Apache-2.0
"""The turns of a record, whichever of the usual forms it has.

Forms: "messages" (OpenAI, ms-swift, trl), "conversations" (ShareGPT, LLaVA, qwen-vl-finetune),
"query" with "response" (ms-swift) and "instruction" with "output" (Alpaca).
"""

from collections.abc import Callable, Mapping
from typing import Any

from megatron_keye.data.conversation.values import is_given, shown, text
from megatron_keye.errors import UserError

Turns = list[Any]


def _listed(key: str) -> Callable[[Mapping[str, Any]], Turns]:
    def turns(record: Mapping[str, Any]) -> Turns:
        turns = record[key]
        if not isinstance(turns, list):
            raise UserError(f"{key!r}: got {shown(turns)}, expected a non-empty list")
        return turns

    return turns


def _query(record: Mapping[str, Any]) -> Turns:
    return [
        *_history(record),
        *_exchange(text(record["query"], "'query'"), record.get("response"), "'response'"),
    ]


def _instruction(record: Mapping[str, Any]) -> Turns:
    # A line each, as LLaMA-Factory joins them.
    given = [key for key in ("instruction", "input") if is_given(record.get(key))]
    question = "\n".join(text(record[key], repr(key)) for key in given)
    return [*_history(record), *_exchange(question, record.get("output"), "'output'")]


def _history(record: Mapping[str, Any]) -> Turns:
    """Return the earlier turns, given as pairs of question and answer."""
    pairs = record.get("history") or []
    if not isinstance(pairs, list) or not all(isinstance(p, list) and len(p) == 2 for p in pairs):
        raise UserError(
            f"'history': got {shown(pairs)}, expected a list of pairs [question, answer]"
        )
    return [
        turn
        for question, answer in pairs
        for turn in _exchange(text(question, "'history'"), answer, "'history'")
    ]


def _exchange(question: str, answer: Any, name: str) -> Turns:
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": text(answer, name)},
    ]


_FORMS: dict[str, Callable[[Mapping[str, Any]], Turns]] = {
    "messages": _listed("messages"),
    "conversations": _listed("conversations"),
    "query": _query,
    "instruction": _instruction,
}
_READ = {
    "messages": {"messages"},
    "conversations": {"conversations"},
    "query": {"query", "response", "history"},
    "instruction": {"instruction", "input", "output", "history"},
}


def read_turns(record: Any) -> tuple[Turns, set[str]]:
    """Return the turns of a record, and the keys that they were read from.

    Args:
        record: An object; a "system" beside the turns is put in front of them.

    Raises:
        UserError: When it has no turns, or turns in two forms.
    """
    keys = record.keys() if isinstance(record, dict) else ()
    forms = [form for form in _FORMS if form in keys and is_given(record[form])]
    if not forms:
        got = sorted(keys) if isinstance(record, dict) else type(record).__name__
        raise UserError(
            f"got {got}, expected an object with a non-empty list 'messages' or 'conversations', "
            "or 'query' and 'response', or 'instruction' and 'output'"
        )
    if len(forms) > 1:
        raise UserError(f"has turns at {forms[0]!r} and at {forms[1]!r}, expected them once")
    turns = _FORMS[forms[0]](record)
    read = {"system", *_READ[forms[0]]}
    if not is_given(record.get("system")):
        return turns, read
    system = text(record["system"], "'system'")
    if any(isinstance(t, dict) and "system" in (t.get("role"), t.get("from")) for t in turns):
        raise UserError("has a 'system' and a turn of the role 'system', expected one of them")
    return [{"role": "system", "content": system}, *turns], read
