# SPDX-License-Identifier: Apache-2.0
"""Makes blocks of a store: each holds the tokenized samples of neighbouring records.

A block is a pure function of its records, the media they name and the settings, so that processes
can make blocks in any order and a killed run keeps those that are complete.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_keye.config import DataConfig, ModelConfig
from megatron_keye.data.conversation import Conversation, parse_conversation
from megatron_keye.data.records.file import SampleFile
from megatron_keye.data.row import Sample
from megatron_keye.data.sample import make_sample, media_names
from megatron_keye.data.store.block_metadata import BlockMetadata
from megatron_keye.data.tokens import load_tokenizer
from megatron_keye.data.video.probe_cache import ProbeCache
from megatron_keye.errors import UserError


@dataclass(frozen=True, kw_only=True)
class BlockMaker:
    """Tokenizes the records of blocks; can be pickled."""

    file: SampleFile
    """Where the records are."""
    config: DataConfig
    """Budgets, loss tokens and tokenizer."""
    model: ModelConfig
    """Ids of placeholders, patch and merge size."""
    probes: ProbeCache
    """Cached probe results of videos."""

    def fill(self, name: str, stream: BinaryIO, advance: Callable[[int], None]) -> dict[str, Any]:
        """Write block `name`: the tokens of its samples, then their metadata.

        Args:
            name: Name of the block.
            stream: Takes int32 pairs [tokens, 2] of token and bits of its label's weight, then
                the metadata.
            advance: Called with 1 after each record.

        Returns:
            Counts of samples, tokens and pictures, the longest sample, samples by what was not
            read of them, and why records were refused.
        """
        metadata = BlockMetadata()
        refused: list[str] = []
        unread: Counter[str] = Counter()
        num_tokens, longest = 0, 0
        for number, record in self.file.read(name):
            try:
                conversation = parse_conversation(
                    record, f"{self.file.path}:{number}", self.file.path.parent
                )
                sample = self._make(conversation)
                names = media_names(conversation)
                metadata.add(sample, number, names, self.probes, self.config.remote)
            except UserError as error:
                refused.append(str(error))
            else:
                stream.write(_token_pairs(sample))
                unread.update(conversation.unread)
                num_tokens += len(sample.token_ids)
                longest = max(longest, len(sample.token_ids))
            advance(1)
        stream.write(metadata.to_bytes())
        return {
            "num_samples": len(metadata.line_numbers),
            "num_tokens": num_tokens,
            "longest": longest,
            "num_pictures": len(metadata.pictures),
            "unread": unread,
            "refused": refused,
        }

    def _make(self, conversation: Conversation) -> Sample:
        return make_sample(
            conversation,
            load_tokenizer(self.config.tokenizer),
            self.config,
            self.model,
            probe_video=self.probes.probe,
        )


def _token_pairs(sample: Sample) -> NDArray[np.int32]:
    """Return [tokens, 2]: each token, and the bits of its label's weight."""
    return np.stack([sample.token_ids.astype("<i4"), sample.weights.view("<i4")], axis=1)
