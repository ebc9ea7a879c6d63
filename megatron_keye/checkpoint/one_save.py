# SPDX-License-Identifier: Apache-2.0
"""One save as the thread of a rank does it: its file, then on rank 0 what makes a checkpoint.

The threads agree by messages, not collectives, so that a save becomes complete even while the
run's main threads wait for each other, or end with an error.
"""

import pickle
import shutil
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from megatron_keye.checkpoint.convert.carried_files import carry_on
from megatron_keye.checkpoint.manifest import write_manifest
from megatron_keye.checkpoint.retention import partial_of, prune, put_in_place
from megatron_keye.checkpoint.shards import Part, whole_tensors, write_parts
from megatron_keye.checkpoint.storage_format import (
    CONFIG,
    CONFIG_TEXT,
    METADATA,
    WholeTensor,
    Written,
    metadata_of,
)
from megatron_keye.config.run import RunConfig
from megatron_keye.errors import UserError
from megatron_keye.files.disk import writing
from megatron_keye.files.written_file import FileSum, write_file, write_text
from megatron_keye.parallel.mailbox import Mailbox

_PEERS_SECONDS = 3600.0
"""How long a thread waits for the files of other ranks, which may be slow; a dead rank ends the
run by other ways."""
_VERDICT = "verdict"


@dataclass(frozen=True)
class Failure:
    """Why a rank's part of a save failed."""

    text: str
    """Sentence, or a traceback."""
    is_users: bool
    """Whether it is a sentence, about what a user can change."""

    def raise_it(self) -> NoReturn:
        """Raise it as a UserError, or as a RuntimeError."""
        raise UserError(self.text) if self.is_users else RuntimeError(self.text)


@dataclass(frozen=True)
class _WrittenFile:
    """The file that a rank wrote."""

    name: str
    """Its name."""
    sum: FileSum
    """Its size and checksum."""
    parts: list[Written]
    """What lies in it."""
    tensors: dict[str, WholeTensor]
    """The whole tensors that these are parts of, by name."""


@dataclass(frozen=True)
class Save:
    """One save on one rank: its thread's work."""

    run: RunConfig
    """How to save."""
    rank: int
    """This rank."""
    folder: Path
    """The checkpoint's name."""
    parts: list[Part] = field(repr=False)
    """What this rank writes."""
    texts: dict[str, str] = field(repr=False)
    """Further files, by name."""
    best: Path
    """A checkpoint that stays whatever its age."""
    mailbox: Mailbox
    """Messages of this save."""

    def __call__(self) -> int:
        """Write this rank's part, learn whether all became a checkpoint, return this part's bytes.

        Raises:
            UserError: When a rank could not write.
            RuntimeError: When a rank failed otherwise.
        """
        written = attempt(self._write, self.folder)
        self.mailbox.post(str(self.rank), pickle.dumps(written))
        if self.rank == 0:
            self.mailbox.post(_VERDICT, pickle.dumps(attempt(self._complete, self.folder)))
        verdict = pickle.loads(self.mailbox.collect([_VERDICT], _PEERS_SECONDS)[0])
        if isinstance(verdict, Failure):
            verdict.raise_it()
        assert isinstance(written, _WrittenFile), "the verdict tells of all failures"
        return written.sum.size_bytes

    def _write(self) -> _WrittenFile:
        name = f"__{self.rank}_0.distcp"
        parts, file_sum = write_file(
            partial_of(self.folder) / name, lambda stream: write_parts(stream, self.parts)
        )
        return _WrittenFile(name, file_sum, parts, whole_tensors(self.parts))

    def _complete(self) -> None:
        """Make the files of all ranks a checkpoint, on rank 0, or remove them."""
        names = [str(rank) for rank in range(dist.get_world_size())]
        answers = [pickle.loads(each) for each in self.mailbox.collect(names, _PEERS_SECONDS)]
        self.mailbox.remove(names)
        partial = partial_of(self.folder)
        try:
            self._add_rest(partial, [self._succeeded(*each) for each in enumerate(answers)])
            put_in_place(self.folder)
        except Exception:
            # Every rank has ended its part, and what stays would keep a full disk full.
            shutil.rmtree(partial, ignore_errors=True)
            raise
        prune(self.folder.parent, self.run.training.checkpoint, kept_too=self.best)

    def _succeeded(self, rank: int, answer: _WrittenFile | Failure) -> _WrittenFile:
        if isinstance(answer, _WrittenFile):
            return answer
        text = f"{self.folder}: not saved: rank {rank}: {answer.text}"
        replace(answer, text=text).raise_it()

    def _add_rest(self, partial: Path, files: list[_WrittenFile]) -> None:
        """Write what lists and describes the files of all ranks."""
        tensors = {key: whole for file in files for key, whole in file.tensors.items()}
        metadata = metadata_of({file.name: file.parts for file in files}, tensors)
        sums = {file.name: file.sum for file in files}
        sums[METADATA] = write_file(partial / METADATA, lambda stream: stream.write(metadata))[1]
        for name, text in {CONFIG: CONFIG_TEXT, **self.texts}.items():
            sums[name] = write_text(partial / name, text)
        carry_on(self.run.folder, partial)
        write_manifest(partial, sums)


def attempt[Result](work: Callable[[], Result], folder: Path) -> Result | Failure:
    """Return the result of some work, or why it failed, for ranks that wait for it.

    Args:
        work: Writes a part of a checkpoint.
        folder: The checkpoint.
    """
    try:
        with writing(folder, "a checkpoint", then=", then go on with --resume auto"):
            return work()
    except UserError as error:
        return Failure(str(error), is_users=True)
    except Exception:
        return Failure(traceback.format_exc(), is_users=False)
