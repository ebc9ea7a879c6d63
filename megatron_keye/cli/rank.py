"""One rank of a run: joins the others, trains, and reports its own errors but not theirs.

Every rank finds the same mistakes in recipe and settings, so only rank 0 reports them; a rank that
fails because another did reports nothing.
"""

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron_keye.cli.arguments import chosen_run
from megatron_keye.cli.environment import complete_environment
from megatron_keye.cli.noise import quieten_libraries
from megatron_keye.cli.status import FAILED, LOST_PEERS, STOPPED, USER_ERROR, report_error
from megatron_keye.config import RunConfig
from megatron_keye.errors import UserError

if TYPE_CHECKING:
    from megatron_keye.parallel.process import Process

Prepare = Callable[[argparse.Namespace, int], RunConfig]
Work = Callable[[RunConfig, "Process"], bool]
"""What a rank does with its run; False where a signal ended it early."""
SECONDS_FOR_RANK_0 = 60.0
"""Other ranks wait this long for it to report wrong settings; a launcher ends them before."""
SECONDS_FOR_THE_FIRST = 3.0
"""A rank that fails because another did waits, so that the launcher sees the other one first."""


def run_rank(
    options: argparse.Namespace, *, prepare: Prepare | None = None, work: Work | None = None
) -> int:
    """Run the rank that torchrun's variables name and return the exit status.

    Args:
        options: Parsed command line.
        prepare: Makes the run for a number of ranks; by default `make_run`.
        work: What the rank does once it has joined the others; by default `train`.
    """
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ.get("WORLD_SIZE", "1"))
    complete_environment(
        os.environ, local_ranks=int(os.environ.get("LOCAL_WORLD_SIZE", str(num_ranks)))
    )
    quieten(rank)
    # srun returns the largest exit status, so a rank that it ends must not exit with 143.
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(FAILED))
    try:
        run = (prepare or make_run)(options, num_ranks)
        if options.show:
            sys.stdout.write(run.to_json() if rank == 0 else "")
            return 0
        run.check_num_ranks(num_ranks)
    except UserError as error:
        if rank == 0:
            return report_error(error)
        time.sleep(SECONDS_FOR_RANK_0)
        return USER_ERROR
    except Exception:
        # A user's recipe may raise anything.
        if rank != 0:
            time.sleep(SECONDS_FOR_RANK_0)
        raise
    return join_and_work(run, rank, num_ranks, work or train)


def make_run(options: argparse.Namespace, num_ranks: int) -> RunConfig:
    """Return the run that the command line describes, for the ranks that were started.

    Raises:
        UserError: For an unknown recipe or setting, or a --ranks other than `num_ranks`.
    """
    import torch

    if options.ranks not in (None, num_ranks):
        raise UserError(
            f"--ranks: got {options.ranks}, expected {num_ranks}, the number of ranks that were "
            "started; leave it out under torchrun and srun"
        )
    return chosen_run(options, num_ranks=num_ranks, has_gpu=torch.cuda.is_available())


def join_and_work(run: RunConfig, rank: int, num_ranks: int, work: Work) -> int:
    """Train, or what else the ranks do together, and return the exit status."""
    import torch

    from megatron_keye.parallel.process import join, resolve_device

    try:
        device = resolve_device(run.device, int(os.environ.get("LOCAL_RANK", "0")))
    except UserError as error:
        return report_error(error)  # on each rank, since machines may differ in their devices
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # ends waiting for peers, unlike a handler
    process = join(device, rank=rank, num_ranks=num_ranks, init_method=init_method(num_ranks))
    try:
        is_finished = work(run, process)
    except Exception as error:
        if not process.is_first_to_fail():
            time.sleep(SECONDS_FOR_THE_FIRST)
            return LOST_PEERS
        if not isinstance(error, UserError):
            raise
        return report_error(error)
    if not is_finished:
        # The first rank to exit makes srun send TERM to the others. Python removes handlers as it
        # exits, but ignored signals stay ignored.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.distributed.destroy_process_group()
    return 0 if is_finished else STOPPED


def train(run: RunConfig, process: "Process") -> bool:
    """Build a trainer on this rank, run it, and return whether it reached its last step."""
    from megatron_keye.config.backends import check_wandb, uses_transformer_engine
    from megatron_keye.training.trainer import Trainer

    if process.rank == 0:
        check_wandb(run.training.logging.wandb_project)
    has_gpu = process.device.type == "cuda"
    engine = uses_transformer_engine(run.training.linear_layers, has_gpu=has_gpu)
    trainer = Trainer(run, process, uses_transformer_engine=engine)
    trainer.train()
    return not trainer.was_stopped


def init_method(num_ranks: int) -> str:
    """Return torch.distributed's init_method; a single rank without one uses any free port."""
    return "env://" if num_ranks > 1 or "MASTER_ADDR" in os.environ else "tcp://127.0.0.1:0"


def quieten(rank: int) -> None:
    """Keep messages of libraries out of the progress display; errors are still logged."""
    quieten_libraries()
    logging.basicConfig(level=logging.WARNING if rank == 0 else logging.ERROR)
    # Warnings about files and their decoding come from the rank that reads them.
    logging.getLogger("megatron_keye.data").setLevel(logging.WARNING)
    logging.getLogger("megatron_keye.training").setLevel(logging.INFO)
