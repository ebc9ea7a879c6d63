# SPDX-License-Identifier: Apache-2.0
"""Writes a tokenizer of whole words, whose small vocabulary suits models that learn in minutes."""

from collections.abc import Iterable
from pathlib import Path

from megatron_keye.errors import UserError

CONTROLS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
)
"""ChatML's tokens, which have the ids from 0."""
ROLES = ("system", "user", "assistant")
"""Words of every conversation."""


def vocabulary(words: Iterable[str]) -> dict[str, int]:
    """Return the ids of CONTROLS, ROLES and other words, in this order."""
    each = dict.fromkeys([*CONTROLS, *ROLES, *words])
    return {word: number for number, word in enumerate(each)}


def write_tokenizer(folder: Path, words: Iterable[str]) -> None:
    """Write a tokenizer in Hugging Face's form; text is split at white space.

    Args:
        folder: Made if it does not exist.
        words: Other than CONTROLS and ROLES, in the order of their ids. One with white space
            in it is one token wherever it stands, so that no model has to learn to join its parts.

    Raises:
        UserError: When transformers is not installed.
    """
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast
    except ImportError as error:
        raise UserError(
            f"{folder}: a tokenizer needs the package transformers, which is not installed; "
            "install megatron_keye with the extra 'hf'"
        ) from error
    ids = vocabulary(words)
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=CONTROLS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(CONTROLS))
    tokenizer.add_tokens([word for word in ids if len(word.split()) > 1])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
