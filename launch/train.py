"""Trains a recipe: the only entry point, run once per rank by local.sh, slurm.sbatch or torchrun.

A wrong setting is told in one sentence by one rank; anything else that fails shows its traceback.
Exit status: 0 done, 75 stopped by a signal and saved, 2 a wrong setting, 1 or 3 failed.
"""

import argparse
import logging
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # local.sh keeps the script's own folder off the path

from megatron_keye.config import RunConfig  # noqa: E402
from megatron_keye.errors import UserError  # noqa: E402
from megatron_keye.recipes import load_recipe, recipe_names  # noqa: E402

if TYPE_CHECKING:
    from megatron_keye.parallel.process import Process

FAILED = 1
USER_ERROR = 2
LOST_PEERS = 3
STOPPED = 75
"""A signal ended the run after a step, which was saved (EX_TEMPFAIL of sysexits.h: try again)."""
SECONDS_FOR_RANK_0 = 60.0
"""What other ranks wait for it to say what is wrong with the settings; a launcher ends them."""
SECONDS_FOR_THE_FIRST = 3.0
"""What a rank that fails because another did waits, so that the launcher sees that one first."""


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="launch/train.py", description=__doc__)
    parser.add_argument("recipe", help=f"one of: {', '.join(recipe_names())}")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="change one setting of the recipe; may be given often",
    )
    parser.add_argument(
        "--resume",
        metavar="auto|none|FOLDER",
        help="short for --set training.checkpoint.resume=...",
    )
    parser.add_argument("--show", action="store_true", help="print the run as JSON and stop")
    return parser.parse_args(arguments)


def make_run(arguments: argparse.Namespace, num_ranks: int, *, has_gpu: bool) -> RunConfig:
    """Make the recipe for the ranks that were started, with the settings of the command line."""
    overrides = list(arguments.set)
    if arguments.resume is not None:
        overrides.append(f"training.checkpoint.resume={arguments.resume}")
    recipe = load_recipe(arguments.recipe)
    return recipe(num_ranks=num_ranks, has_gpu=has_gpu).with_overrides(overrides)


def main(arguments: list[str]) -> int:
    """Train, and return the exit code."""
    rank = int(os.environ.get("RANK", "0"))
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    options = parse_arguments(arguments)
    # srun gives the largest exit status: a rank that it ends must not hide why it does.
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(FAILED))
    try:
        # Every rank finds the same mistakes up to here, so rank 0 speaks for all.
        import torch

        from megatron_keye.parallel.process import join, resolve_device

        run = make_run(options, num_ranks, has_gpu=torch.cuda.is_available())
        if options.show:
            sys.stdout.write(run.to_json() if rank == 0 else "")
            return 0
        run.check_num_ranks(num_ranks)
    except UserError as error:
        if rank == 0:
            return complain(error)
        time.sleep(SECONDS_FOR_RANK_0)
        return USER_ERROR
    try:
        device = resolve_device(run.device, int(os.environ.get("LOCAL_RANK", "0")))
    except UserError as error:
        return complain(error)  # another machine may have all its devices
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # ends waiting for peers, unlike a handler
    quieten(rank)
    process = join(device, rank=rank, num_ranks=num_ranks, init_method=meeting_point(num_ranks))
    try:
        is_finished = train(run, process)
    except Exception as error:
        if not process.is_first_to_fail():
            time.sleep(SECONDS_FOR_THE_FIRST)
            return LOST_PEERS
        if not isinstance(error, UserError):
            raise
        return complain(error)
    if not is_finished:
        # The first rank to leave makes srun send TERM to the others. Python takes handlers away
        # as it ends, but lets signals be ignored.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.distributed.destroy_process_group()
    return 0 if is_finished else STOPPED


def train(run: RunConfig, process: "Process") -> bool:
    """Build a trainer on this rank, run it, and tell whether it came to its last step."""
    from megatron_keye.config.backends import takes_transformer_engine
    from megatron_keye.training.trainer import Trainer

    has_gpu = process.device.type == "cuda"
    engine = takes_transformer_engine(run.training.linear_layers, has_gpu=has_gpu)
    trainer = Trainer(run, process, uses_transformer_engine=engine)
    trainer.train()
    return not trainer.was_stopped


def meeting_point(num_ranks: int) -> str:
    """Return where ranks meet: the launcher's address, or a port of one's own when alone."""
    return "env://" if num_ranks > 1 or "MASTER_ADDR" in os.environ else "tcp://127.0.0.1:0"


def quieten(rank: int) -> None:
    """Keep libraries' notes out of the progress display; errors still come through."""
    warnings.filterwarnings("ignore")
    logging.basicConfig(level=logging.WARNING if rank == 0 else logging.ERROR)
    # What is said of files and of how they are decoded comes from the rank that it happens on.
    logging.getLogger("megatron_keye.data").setLevel(logging.WARNING)
    logging.getLogger("megatron_keye.training").setLevel(logging.INFO)
    logging.getLogger("megatron.core").setLevel(logging.ERROR)


def complain(error: UserError) -> int:
    """Say what is wrong in one sentence and return the exit code."""
    sys.stderr.write(f"error: {error}\n")
    return USER_ERROR


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
