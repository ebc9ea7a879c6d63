"""Endless packed rows from a sample file, in an order that depends only on seed and position.

Every rank makes the same rows and takes its share, so the order is the same for any number of
ranks and the state is two numbers.
"""

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from megatron_keye.config import DataConfig, ModelConfig
from megatron_keye.config.check import check
from megatron_keye.data.conversation import read_conversations
from megatron_keye.data.media import resolve_media
from megatron_keye.data.packing import fill_row, pack
from megatron_keye.data.row import PackedRow, Sample
from megatron_keye.data.sample import make_sample
from megatron_keye.data.tokens import END_OF_TEXT, load_tokenizer

# Small sample files are tokenized once; long samples are megabytes, so large files are not kept.
_SAMPLES_KEPT = 256


class RowLoader:
    """Reads samples, shuffles them in each epoch and packs them into rows.

    Args:
        config: Sample file, row length, tokenizer, budgets.
        model: Vocabulary and picture sizes.
        seed: Decides the order of every epoch.

    Raises:
        ValueError: For a sample file that is missing or malformed anywhere, or a tokenizer that
            has more entries than the model. Media are opened, and refused, when they come up.
    """

    def __init__(self, config: DataConfig, model: ModelConfig, seed: int) -> None:
        path = resolve_media(config.samples, Path())
        self._tokenizer = load_tokenizer(config.tokenizer)
        check(
            self._tokenizer.vocab_size <= model.decoder.vocab_size,
            "model.decoder.vocab_size",
            model.decoder.vocab_size,
            f"at least the {self._tokenizer.vocab_size} entries of data.tokenizer",
        )
        self._config = config
        self._model = model
        self._seed = seed
        self._path = path
        self._conversations = read_conversations(path)
        self._digest = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
        self._pad_token_id = self._tokenizer.control_id(END_OF_TEXT)
        self._epoch = 0
        self._position = 0
        self._sample = lru_cache(_SAMPLES_KEPT)(self._make_sample)
        self._order = lru_cache(2)(self._make_order)

    @property
    def num_samples(self) -> int:
        """Samples of one epoch."""
        return len(self._conversations)

    def next_rows(self, count: int) -> list[PackedRow]:
        """Return the next rows of the whole run, whatever the number of ranks.

        Args:
            count: Rows wanted; the position moves on by them.

        Raises:
            ValueError: Naming the sample that cannot be read or is longer than a row. The
                position stays before these rows.
        """
        start = self._epoch, self._position
        try:
            return [self._next_row() for _ in range(count)]
        except ValueError:
            self._epoch, self._position = start
            raise

    def state_dict(self) -> dict[str, int | str]:
        """Return where the loader stands: JSON-ready."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "seed": self._seed,
            "samples_digest": self._digest,
        }

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Continue exactly where `state_dict` was taken.

        Args:
            state: What `state_dict` returned.

        Raises:
            ValueError: When it belongs to other samples or another seed.
        """
        if state["samples_digest"] != self._digest:
            raise ValueError(
                f"data.samples: {self._path} has content {self._digest}, expected "
                f"{state['samples_digest']} as when the checkpoint was saved; restore the file, "
                "or start afresh with training.checkpoint.resume=none"
            )
        check(
            state["seed"] == self._seed,
            "training.seed",
            self._seed,
            f"{state['seed']} as when the checkpoint was saved, for the same sample order",
        )
        self._epoch, self._position = int(state["epoch"]), int(state["position"])

    def _next_row(self) -> PackedRow:
        samples = fill_row(self._stream(), self._config.row_tokens)
        passed = self._position + len(samples)
        self._epoch += passed // self.num_samples
        self._position = passed % self.num_samples
        return pack(samples, self._config.row_tokens, pad_token_id=self._pad_token_id)

    def _stream(self) -> Iterator[Sample]:
        """Yield samples from the present position on, without end."""
        epoch, position = self._epoch, self._position
        while True:
            for index in self._order(epoch)[position:]:
                yield self._sample(index)
            epoch, position = epoch + 1, 0

    def _make_order(self, epoch: int) -> list[int]:
        """Return the order of one epoch."""
        if not self._config.shuffles:
            return list(range(self.num_samples))
        generator = np.random.default_rng((self._seed, epoch))
        return [int(index) for index in generator.permutation(self.num_samples)]

    def _make_sample(self, index: int) -> Sample:
        """Tokenize one sample."""
        return make_sample(self._conversations[index], self._tokenizer, self._config, self._model)
