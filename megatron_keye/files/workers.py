# SPDX-License-Identifier: Apache-2.0
"""Fills the files of a folder with several processes, one file per process at a time."""

import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, BinaryIO, Protocol

from megatron_keye.errors import UserError
from megatron_keye.files import worker_origin
from megatron_keye.files.children import end_with_starter
from megatron_keye.files.disk import DiskError
from megatron_keye.files.partial_folder import PartialFolder

_POLL_SECONDS = 0.2
Advance = Callable[[int], None]
"""Called with the work done since the last call, in bytes or the maker's own unit."""


class FileMaker(Protocol):
    """Fills each file of a folder; can be pickled."""

    def fill(self, name: str, stream: BinaryIO, advance: Advance) -> Any:
        """Write the content of file `name` and return a record, ready for JSON."""


def make_files(
    maker: FileMaker,
    names: Sequence[str],
    folder: PartialFolder,
    *,
    num_workers: int,
    advance: Advance,
) -> None:
    """Fill those files that have no record yet.

    Args:
        maker: Fills them.
        names: Their names.
        folder: Their folder.
        num_workers: Processes; 1 works in this one.
        advance: Called with the work done.

    Raises:
        UserError: When a process finds an error in the data.
        DiskError: When the disk refuses a file.
        RuntimeError: When a process failed otherwise.
    """
    waiting = [name for name in names if folder.record(name) is None]
    num_workers = min(num_workers, len(waiting))
    if num_workers <= 1:
        for name in waiting:
            _make(maker, name, folder, advance)
        return
    workers = [_Worker(maker, folder) for _ in range(num_workers)]
    try:
        _distribute(workers, waiting[::-1], advance)
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """One process; it ends when this one ends, also when this one is killed."""

    def __init__(self, maker: FileMaker, folder: PartialFolder) -> None:
        context = worker_origin.context([type(maker).__module__])
        self.pipe, child_pipe = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(child_pipe, maker, folder), daemon=True
        )
        self._process.start()
        child_pipe.close()

    def stop(self) -> None:
        """End the process at once."""
        self.pipe.close()
        self._process.kill()
        self._process.join()


def _distribute(workers: list[_Worker], waiting: list[str], advance: Advance) -> None:
    busy: dict[Any, _Worker] = {}
    for worker in workers:
        worker.pipe.send(waiting.pop())
        busy[worker.pipe] = worker
    while busy:
        for pipe in wait(list(busy), timeout=_POLL_SECONDS):
            worker = busy[pipe]
            match _receive(worker.pipe):
                case int(amount):
                    advance(amount)
                case None if waiting:
                    worker.pipe.send(waiting.pop())
                case None:
                    del busy[pipe]


def _receive(pipe: Connection) -> int | None:
    """Return the work done, or None for a finished file; raise the worker's error."""
    try:
        kind, content = pipe.recv()
    except (EOFError, ConnectionError):
        raise RuntimeError(
            "a worker process was killed, perhaps out of memory; run the same command again "
            "to continue, with fewer --workers"
        ) from None
    if kind == "refused":
        raise DiskError(content)
    if kind == "wrong":
        raise UserError(content)
    if kind == "failed":
        raise RuntimeError(f"a worker process failed:\n{content}")
    return int(content) if kind == "advance" else None


def _serve(pipe: Connection, maker: FileMaker, folder: PartialFolder) -> None:
    end_with_starter()
    while True:
        try:
            name = pipe.recv()
        except EOFError:
            return
        try:
            _make(maker, name, folder, lambda n: pipe.send(("advance", n)))
            answer = ("done", "")
        except DiskError as error:
            answer = ("refused", str(error))
        except UserError as error:
            answer = ("wrong", str(error))
        except BrokenPipeError:
            return
        except BaseException:
            answer = ("failed", traceback.format_exc())
        pipe.send(answer)


def _make(maker: FileMaker, name: str, folder: PartialFolder, advance: Advance) -> None:
    folder.write(name, lambda stream: maker.fill(name, stream, advance))
