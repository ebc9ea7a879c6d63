# SPDX-License-Identifier: Apache-2.0
"""One rank of a run: joins the others, trains, and is watched while it does.

Every rank finds the same mistakes in recipe and settings, so only rank 0 reports them; of later
errors `failure.py` tells.
"""

import argparse
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_keye.cli.arguments import chosen_run
from megatron_keye.cli.environment import complete_environment
from megatron_keye.cli.local import meeting_socket
from megatron_keye.cli.noise import quieten_libraries
from megatron_keye.cli.shared_heartbeats import open_slot
from megatron_keye.cli.status import FAILED, LOST_PEERS, STOPPED, USER_ERROR, report_error
from megatron_keye.config import RunConfig
from megatron_keye.errors import UserError
from megatron_keye.estimate.disk_room import check_room
from megatron_keye.files.children import end_with_parent, take_children_along
from megatron_keye.files.disk import writing
from megatron_keye.files.temporary import keep_sockets_removable
from megatron_keye.observe.heartbeat import Heartbeat
from megatron_keye.plan.places import role_of

if TYPE_CHECKING:
    from megatron_keye.observe.watchdog import Watchdog
    from megatron_keye.parallel.process import Process

Prepare = Callable[[argparse.Namespace, int], RunConfig]
Work = Callable[[RunConfig, "Process"], bool]
"""What a rank does with its run; False where a signal ended it early."""
_GO_ON = ", then go on with --resume auto"
SECONDS_FOR_RANK_0 = 60.0
"""Other ranks wait this long for it to report wrong settings; a launcher ends them before."""


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
    if "SLURM_PROCID" in os.environ:
        end_with_parent(os.getppid())  # slurmstepd; the local launcher sees to it itself
    take_children_along()
    # A warning that comes before the run listens waits until it can save; threads start later.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    heartbeat = Heartbeat(rank=rank, publish=open_slot(rank))
    heartbeat.note("start")
    signal.signal(signal.SIGTERM, lambda number, frame: end_by_signal(number, heartbeat))
    try:
        keep_sockets_removable()
        run = (prepare or make_run)(options, num_ranks)
        if options.show:
            sys.stdout.write(run.to_json() if rank == 0 else "")
            return 0
        run.check_num_ranks(num_ranks)
        # Only training writes much; a machine's ranks would all find the same.
        if work is None and os.environ.get("LOCAL_RANK", "0") == "0":
            check_room(run)
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
    heartbeat.role = role_of(run.parallel, rank)
    return join_and_work(run, heartbeat, num_ranks, work or train)


def end_by_signal(number: int, heartbeat: Heartbeat) -> NoReturn:
    """End this rank, which has not joined the others, as a signal asks; the launcher tells of it.

    srun and torchrun name a rank that ends themselves, and end all others the same way.

    Args:
        number: The signal.
        heartbeat: Of this rank.
    """
    heartbeat.end_signal = number
    heartbeat.mark()
    # srun returns the largest exit status, so a rank that it ends must not exit with 143.
    os._exit(FAILED)


def make_run(options: argparse.Namespace, num_ranks: int) -> RunConfig:
    """Return the run that the command line describes, for the ranks that were started.

    Raises:
        UserError: For an unknown recipe or setting, or a --ranks other than `num_ranks`.
    """
    import torch

    from megatron_keye.checkpoint.restart import with_rows_of_job

    if options.ranks not in (None, num_ranks):
        raise UserError(
            f"--ranks: got {options.ranks}, expected {num_ranks}, the number of ranks that were "
            "started; leave it out under torchrun and srun"
        )
    run = chosen_run(options, num_ranks=num_ranks, has_gpu=torch.cuda.is_available())
    return with_rows_of_job(run)


def join_and_work(run: RunConfig, heartbeat: Heartbeat, num_ranks: int, work: Work) -> int:
    """Train, or what else the ranks do together, and return the exit status."""
    import torch

    from megatron_keye.cli.failure import end_failed, exit_failed
    from megatron_keye.parallel.process import exchange_timeout, join, resolve_device

    try:
        device = resolve_device(run.device, int(os.environ.get("LOCAL_RANK", "0")))
    except UserError as error:
        return report_error(error)  # on each rank, since machines may differ in their devices
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # ends waiting for peers, unlike a handler
    heartbeat.note("join")
    try:
        process = join(
            device,
            rank=heartbeat.rank,
            num_ranks=num_ranks,
            init_method=init_method(num_ranks),
            listen_fd=meeting_socket(),
            timeout=exchange_timeout(run.training.hang_minutes),
            heartbeat=heartbeat,
        )
    except torch.distributed.DistError as error:
        reason = str(error).partition("\n")[0]
        sys.stderr.write(f"error: {heartbeat.who()} cannot join the other ranks: {reason}\n")
        return LOST_PEERS
    watchdog = watch(run, process)
    try:
        is_finished = work(run, process)
    except Exception as error:
        # Whoever sends it ends all ranks, for a reason that was told.
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(LOST_PEERS))
        exit_failed(end_failed(error, process, watchdog))
    watchdog.close()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # one that comes late
    if not is_finished:
        # The first rank to exit makes srun send TERM to the others. Python removes handlers as it
        # exits, but ignored signals stay ignored.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.distributed.destroy_process_group()
    return 0 if is_finished else STOPPED


def watch(run: RunConfig, process: "Process") -> "Watchdog":
    """Return a watchdog that ends this rank when the run hangs, or when NCCL fails."""
    from megatron_keye.cli.failure import end_hung, end_without_exchanges
    from megatron_keye.observe.watchdog import Watchdog
    from megatron_keye.parallel.heartbeat_board import HeartbeatBoard
    from megatron_keye.parallel.process import exchange_error

    watchdog = Watchdog(
        process.heartbeat,
        HeartbeatBoard(process),
        roles=[role_of(run.parallel, rank) for rank in range(process.num_ranks)],
        limit_seconds=60 * run.training.hang_minutes or math.inf,
        folder=run.folder / "hangs",
        tell=sys.stderr.write,
        end=end_hung,
        find_error=exchange_error,
        end_failed=lambda error: end_without_exchanges(error, process, watchdog),
    )
    watchdog.start()
    return watchdog


def train(run: RunConfig, process: "Process") -> bool:
    """Build a trainer on this rank, run it, and return whether it reached its last step."""
    from megatron_keye.config.backends import check_wandb
    from megatron_keye.evaluation import Evaluation
    from megatron_keye.post_training.trainer import PolicyTrainer
    from megatron_keye.training.trainer import Trainer

    if process.rank == 0:
        check_wandb(run.training.logging.wandb_project)
    with writing(run.folder, "the run's files", then=_GO_ON):
        kind = PolicyTrainer if run.post_training.is_on else Trainer
        chosen = operators(run, process)
        evaluation = partial(Evaluation, **chosen)
        trainer = kind(run, process, open_evaluation=evaluation, **chosen)
        trainer.train()
    return not trainer.was_stopped


def recompute(run: RunConfig, process: "Process", file: Path) -> bool:
    """Compute the bad step of a file again, print what comes out, and return True."""
    from megatron_keye.training.health.bad_step import BadStep
    from megatron_keye.training.health.replay import replay

    if run.post_training.is_on:
        raise UserError(
            f"--replay: got a step of post_training.kind={run.post_training.kind}, whose rows are "
            "answers and in no file; continue its newest checkpoint with --resume, which "
            "generates the same ones"
        )
    result = replay(run, process, BadStep.read(file), **operators(run, process))
    if process.rank == 0:
        sys.stdout.write(f"{result}\n")
    return True


def operators(run: RunConfig, process: "Process") -> dict[str, Any]:
    """Return whose linear layers and which fused kernels the run takes on this machine."""
    from megatron_keye.config.backends import uses_transformer_engine
    from megatron_keye.config.fused_kernels import choose_fusions

    has_gpu = process.device.type == "cuda"
    engine = uses_transformer_engine(run.training, has_gpu=has_gpu)
    fusions = choose_fusions(run.training, has_gpu=has_gpu, uses_transformer_engine=engine)
    return {"uses_transformer_engine": engine, "fusions": fusions}


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
    if rank == 0:  # which implementation each operator takes, once
        logging.getLogger("megatron_keye.kernels").setLevel(logging.INFO)
