"""The interface of sample sources, and the source that tokenizes a file of conversations.

The other source, a prepared store, is in store/reader.py; the loader uses the interface alone.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from megatron_keye.config import DataConfig, ModelConfig
from megatron_keye.data.conversation import read_conversations
from megatron_keye.data.row import Sample
from megatron_keye.data.sample import make_sample
from megatron_keye.data.tokens import Tokenizer

# Small files are tokenized once; a long sample takes megabytes, so large files are not kept.
_SAMPLES_KEPT = 256


class SampleSource(Protocol):
    """Samples by number."""

    path: Path
    """Their file or folder."""
    digest: str
    """Changes with the content, so that a checkpoint identifies its samples."""
    num_samples: int
    """How many there are, numbered from 0."""

    def name(self, index: int) -> str:
        """Return the file and line that a sample comes from."""

    def measure(self, index: int) -> int:
        """Return a sample's length in tokens; UserError, naming it, when it is unusable."""

    def load(self, indices: Sequence[int]) -> list[Sample]:
        """Return samples in the order asked for; UserError as `measure`."""


class ConversationFile:
    """Samples of a file with JSON lines.

    Args:
        path: The file.
        tokenizer: Vocabulary.
        config: Budgets, loss tokens, packing window.
        model: Ids of placeholders, patch and merge size.

    Raises:
        UserError: Naming file and line of what is malformed; media are opened when their
            sample is drawn.
    """

    def __init__(
        self, path: Path, tokenizer: Tokenizer, config: DataConfig, model: ModelConfig
    ) -> None:
        self.path = path
        self.digest = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
        self._conversations = read_conversations(path)
        self.num_samples = len(self._conversations)
        self._tokenizer, self._config, self._model = tokenizer, config, model
        # Samples in the packing window have been tokenized already, for their lengths.
        self._sample = lru_cache(max(_SAMPLES_KEPT, 2 * config.packing_window))(self._make)

    def name(self, index: int) -> str:
        """Return the file and line that a sample comes from."""
        return self._conversations[index].name

    def measure(self, index: int) -> int:
        """Tokenize one sample and return its length; UserError when that fails."""
        return len(self._sample(index).token_ids)

    def load(self, indices: Sequence[int]) -> list[Sample]:
        """Return samples in the order asked for; UserError naming an unusable one."""
        return [self._sample(index) for index in indices]

    def _make(self, index: int) -> Sample:
        return make_sample(self._conversations[index], self._tokenizer, self._config, self._model)
