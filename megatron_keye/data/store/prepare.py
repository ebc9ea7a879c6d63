"""Makes blocks of a store: each holds the tokenized samples of neighbouring lines.

A block is a pure function of its lines, the media they name and the settings, so that processes
can make blocks in any order and a killed run keeps those that are complete.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_keye.config import DataConfig, ModelConfig
from megatron_keye.data.conversation import Conversation, parse_conversation
from megatron_keye.data.media import resolve_media
from megatron_keye.data.row import Sample
from megatron_keye.data.sample import make_sample
from megatron_keye.data.store.block_metadata import BlockMetadata
from megatron_keye.data.store.probe_cache import ProbeCache
from megatron_keye.data.tokens import load_tokenizer
from megatron_keye.errors import UserError

LINES_PER_BLOCK = 64
"""Most work that a kill costs a worker. At 256K tokens per line, a block takes 134 MB on disk."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True)
class LineRange:
    """Neighbouring lines of a sample file."""

    offset: int
    """First byte of the first line."""
    size_bytes: int
    """Bytes of all lines."""
    first: int
    """Number of the first line, from 1."""
    num_samples: int
    """Lines that are not empty."""


@dataclass(frozen=True, kw_only=True)
class SampleFile:
    """A sample file, cut into blocks."""

    path: Path
    """The file."""
    digest: str
    """Digest of its content."""
    blocks: dict[str, LineRange]
    """Lines of each block by its name, in order."""

    @property
    def num_samples(self) -> int:
        """Lines that are not empty."""
        return sum(lines.num_samples for lines in self.blocks.values())


def scan(path: Path, lines_per_block: int = LINES_PER_BLOCK) -> SampleFile:
    """Cut a sample file into blocks, reading it once, line by line.

    Raises:
        UserError: For a file that cannot be read, has no samples or is one JSON list.
    """
    digest = hashlib.blake2b(digest_size=16)
    blocks: list[LineRange] = []
    first, offset, position, number, num_samples = 1, 0, 0, 0, 0
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                text = line.removeprefix(_BYTE_ORDER_MARK).strip()
                if text.startswith(b"[") and not blocks and not num_samples:
                    raise UserError(
                        f"{path}: is one JSON list, expected one object per line; convert it with "
                        f"jq -c '.[]' {path}"
                    )
                digest.update(line)
                position += len(line)
                num_samples += bool(text)
                if num_samples == lines_per_block:
                    blocks.append(_line_range(offset, position, first, num_samples))
                    first, offset, num_samples = number + 1, position, 0
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); correct the name") from error
    if num_samples:
        blocks.append(_line_range(offset, position, first, num_samples))
    if not blocks:
        raise UserError(f"{path}: holds no samples, expected one conversation per line")
    named = {f"block-{number:08d}": lines for number, lines in enumerate(blocks)}
    return SampleFile(path=path, digest=digest.hexdigest(), blocks=named)


def _line_range(offset: int, end: int, first: int, num_samples: int) -> LineRange:
    return LineRange(offset=offset, size_bytes=end - offset, first=first, num_samples=num_samples)


@dataclass(frozen=True, kw_only=True)
class BlockMaker:
    """Tokenizes the lines of blocks; can be pickled."""

    file: SampleFile
    """Where the lines are."""
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
            stream: Takes int32 pairs [tokens, 2] of token and label, then the metadata.
            advance: Called with 1 after each line.

        Returns:
            Counts of samples, tokens and pictures, the longest sample, and why lines were refused.
        """
        metadata = BlockMetadata()
        refused: list[str] = []
        num_tokens, longest = 0, 0
        for number, line in self._read(self.file.blocks[name]):
            try:
                conversation = self._parse(line, f"{self.file.path}:{number}")
                sample = self._make(conversation)
                metadata.add(sample, number, _media_names(conversation), self.probes)
            except UserError as error:
                refused.append(str(error))
            else:
                stream.write(np.stack([sample.token_ids, sample.labels], axis=1).astype("<i4"))
                num_tokens += len(sample.token_ids)
                longest = max(longest, len(sample.token_ids))
            advance(1)
        stream.write(metadata.to_bytes())
        return {
            "num_samples": len(metadata.line_numbers),
            "num_tokens": num_tokens,
            "longest": longest,
            "num_pictures": len(metadata.pictures),
            "refused": refused,
        }

    def _read(self, lines: LineRange) -> Iterator[tuple[int, bytes]]:
        with self.file.path.open("rb") as stream:
            stream.seek(lines.offset)
            content = stream.read(lines.size_bytes)
        if lines.first == 1:
            content = content.removeprefix(_BYTE_ORDER_MARK)
        for number, line in enumerate(content.split(b"\n"), start=lines.first):
            if line.strip():
                yield number, line

    def _parse(self, line: bytes, name: str) -> Conversation:
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{name}: is not UTF-8 ({error}); convert the file") from error
        return parse_conversation(text, name, self.file.path.parent)

    def _make(self, conversation: Conversation) -> Sample:
        return make_sample(
            conversation,
            load_tokenizer(self.config.tokenizer),
            self.config,
            self.model,
            probe_video=self.probes.probe,
        )


def _media_names(conversation: Conversation) -> dict[str, str]:
    """Return the name of each media file as written in the conversation, by absolute path."""
    return {
        str(resolve_media(part.value, conversation.base)): part.value
        for message in conversation.messages
        for part in message.parts
        if part.kind != "text"
    }
