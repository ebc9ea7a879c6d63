# SPDX-License-Identifier: Apache-2.0
"""The interface of sample sources, and the source that tokenizes a file of conversations.

The other source, a prepared store, is in store/reader.py; beyond `open_source` the interface alone
is used.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from megatron_keye.config import DataConfig, ModelConfig
from megatron_keye.data.conversation import Conversation, parse_conversation
from megatron_keye.data.media import resolve_media
from megatron_keye.data.records.file import RecordFile
from megatron_keye.data.row import Sample
from megatron_keye.data.sample import make_sample
from megatron_keye.data.store.settings import deciding_settings
from megatron_keye.data.tokens import Tokenizer
from megatron_keye.data.video.probe_cache import node_cache
from megatron_keye.data.video.video_info import VideoInfo
from megatron_keye.errors import UserError

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
    unread: Mapping[str, int]
    """Samples by what was not read of their records (`Conversation.unread`)."""

    def name(self, index: int) -> str:
        """Return the file and line that a sample comes from."""

    def measure(self, index: int) -> int:
        """Return a sample's length in tokens; UserError, naming it, when it is unusable."""

    def load(self, indices: Sequence[int]) -> list[Sample]:
        """Return samples in the order asked for; UserError as `measure`."""

    def video_info(self, path: Path) -> VideoInfo | None:
        """Return what it keeps of a video of a sample that was loaded lately; None if nothing."""


class ConversationFile:
    """Samples of a file of conversations, which are checked at once and read when drawn.

    Args:
        path: JSON lines, one JSON list, or parquet.
        tokenizer: Vocabulary.
        config: Budgets, loss tokens, packing window.
        model: Ids of placeholders, patch and merge size.

    Raises:
        UserError: Naming file and line of what is malformed, unless bad samples are skipped;
            media are opened when their sample is drawn.
    """

    def __init__(
        self, path: Path, tokenizer: Tokenizer, config: DataConfig, model: ModelConfig
    ) -> None:
        self.path = path
        self._tokenizer, self._config, self._model = tokenizer, config, model
        self._records = RecordFile(path)
        self.digest = self._records.digest
        self.num_samples = len(self._records)
        self.unread: Mapping[str, int] = Counter(
            name for index in range(self.num_samples) for name in self._unread(index)
        )
        self._probes = node_cache()
        # Samples in the packing window have been tokenized already, for their lengths.
        self._sample = lru_cache(max(_SAMPLES_KEPT, 2 * config.packing_window))(self._make)

    def name(self, index: int) -> str:
        """Return the file and line that a sample comes from."""
        return self._records.name(index)

    def measure(self, index: int) -> int:
        """Tokenize one sample and return its length; UserError when that fails."""
        return len(self._sample(index).token_ids)

    def load(self, indices: Sequence[int]) -> list[Sample]:
        """Return samples in the order asked for; UserError naming an unusable one."""
        return [self._sample(index) for index in indices]

    def video_info(self, path: Path) -> None:
        """Return None: a file of conversations keeps nothing of its videos."""

    def _unread(self, index: int) -> tuple[str, ...]:
        """Check one record; a malformed one that may be skipped is refused when it is drawn."""
        try:
            return self._parse(index).unread
        except UserError:
            if self._config.on_bad_sample == "refuse":
                raise
            return ()

    def _parse(self, index: int) -> Conversation:
        return parse_conversation(self._records.read(index), self.name(index), self.path.parent)

    def _make(self, index: int) -> Sample:
        return make_sample(
            self._parse(index),
            self._tokenizer,
            self._config,
            self._model,
            probe_video=self._probes.probe,
        )


def open_source(
    name: str, tokenizer: Tokenizer, config: DataConfig, model: ModelConfig
) -> SampleSource:
    """Open a file of conversations, or a store if `name` is a folder."""
    if not Path(name).is_dir():
        return ConversationFile(resolve_media(name, Path()), tokenizer, config, model)
    # zarr takes most of a second to import, and runs on sample files do not need it.
    from megatron_keye.data.store.reader import SampleStore

    return SampleStore(Path(name), deciding_settings(tokenizer, config, model))
