"""Lets several processes fill the files of a folder, one file each at a time."""

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any, BinaryIO, Protocol

import torch

from megatron_keye.errors import UserError
from megatron_keye.files import worker_origin
from megatron_keye.files.partial_folder import PartialFolder

_POLL_SECONDS = 0.2
Advance = Callable[[int], None]
"""Takes how much was done since the last call: bytes, or whatever the maker counts."""


class FileMaker(Protocol):
    """Knows how to fill each file of a folder; pickles."""

    def fill(self, name: str, stream: BinaryIO, advance: Advance) -> Any:
        """Write the content of file `name` and return a record that JSON can hold."""


def make_files(
    maker: FileMaker,
    names: Sequence[str],
    folder: PartialFolder,
    *,
    num_workers: int,
    advance: Advance,
) -> None:
    """Fill the files that are not finished yet.

    Args:
        maker: Fills them.
        names: Their names.
        folder: Where they go.
        num_workers: Processes; 1 works in this one.
        advance: Hears of what was done.

    Raises:
        UserError: What a process found wrong with the data.
        RuntimeError: When a process failed otherwise.
    """
    waiting = [name for name in names if folder.record(name) is None]
    num_workers = min(num_workers, len(waiting))
    if num_workers <= 1:
        with _one_thread():
            for name in waiting:
                _make(maker, name, folder, advance)
        return
    workers = [_Worker(maker, folder) for _ in range(num_workers)]
    try:
        _hand_out(workers, waiting[::-1], advance)
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """One process; it ends when this end of the pipe closes, so also when we are killed."""

    def __init__(self, maker: FileMaker, folder: PartialFolder) -> None:
        context = worker_origin.context([type(maker).__module__])
        self.pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, maker, folder), daemon=True)
        self._process.start()
        there.close()

    def stop(self) -> None:
        """End the process at once."""
        self.pipe.close()
        self._process.kill()
        self._process.join()


def _hand_out(workers: list[_Worker], waiting: list[str], advance: Advance) -> None:
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
    """Return how much was done, or None for a finished file; raise what went wrong over there."""
    try:
        kind, content = pipe.recv()
    except (EOFError, ConnectionError):
        raise RuntimeError(
            "a worker process was killed, perhaps for want of memory; run the same command "
            "again to continue, with fewer --workers"
        ) from None
    if kind == "wrong":
        raise UserError(content)
    if kind == "failed":
        raise RuntimeError(f"a worker process failed:\n{content}")
    return int(content) if kind == "advance" else None


def _serve(pipe: Connection, maker: FileMaker, folder: PartialFolder) -> None:
    with _one_thread():
        while True:
            try:
                name = pipe.recv()
            except EOFError:
                return
            try:
                _make(maker, name, folder, lambda n: pipe.send(("advance", n)))
                answer = ("done", "")
            except UserError as error:
                answer = ("wrong", str(error))
            except BrokenPipeError:
                return
            except BaseException:
                answer = ("failed", traceback.format_exc())
            pipe.send(answer)


def _make(maker: FileMaker, name: str, folder: PartialFolder, advance: Advance) -> None:
    folder.write(name, lambda stream: maker.fill(name, stream, advance))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Leave parallelism to processes, and checksums, which no reader of ours checks, out."""
    threads, checksums = torch.get_num_threads(), torch.serialization.get_crc32_options()
    torch.set_num_threads(1)
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.serialization.set_crc32_options(checksums)
