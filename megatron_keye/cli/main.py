# SPDX-License-Identifier: Apache-2.0
"""The program `megatron-keye`: imports the module of the given command and runs it.

No other command is imported, so that planning and --help start without torch.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from megatron_keye import __version__
from megatron_keye.cli.status import USER_ERROR
from megatron_keye.config.check import suggest

COMMANDS = {
    "train": "train a recipe on this machine, or as one rank of torchrun or srun",
    "generate": "answer questions with a trained model, those of a file or in a chat",
    "run_stages": "train all stages of a model, each from the one before",
    "plan": "show ranks, parameters and memory of a recipe, or the plan of one step",
    "evaluate": "score answers to questions about videos",
    "show_rollouts": "show the best and the worst answers of a run that learns from rewards",
    "forge_video": "make clips with known events, and questions with right answers",
    "interleave": "cut captioned videos into samples of short pieces",
    "prepare": "tokenize samples into a store on disk",
    "convert": "convert checkpoints from and to the released (Hugging Face) form",
    "verify": "compare a checkpoint with another form or implementation of the model",
    "simulate": "simulate the schedule on a mix of sample lengths",
    "profile": "show where the time and memory of a run's steps go",
    "doctor": "report what is installed on this machine and what is missing",
    "settings": "list the settings of a run with types, defaults and meaning",
}
"""Each command's line in --help; its module has its name and a function `main`."""
TRAIN_MODULES = ("absl", "av", "megatron", "numpy", "PIL", "psutil", "rich", "tiktoken", "zarr")
"""What the extra `train` brings and an installation for the kernels alone lacks."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    Args:
        arguments: The arguments after `megatron-keye`; None for those of this process.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser = _make_parser()
    # The command parses its own options, --help among them.
    options = parser.parse_args(words[:1])
    if options.command is None:
        parser.print_help()
        return USER_ERROR
    if options.command not in COMMANDS:
        parser.error(f"got command {options.command!r}; {suggest(options.command, COMMANDS)}")
    try:
        command = importlib.import_module(f"megatron_keye.cli.{options.command}")
        status: int = command.main(words[1:])
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in TRAIN_MODULES:
            raise
        print(
            f"megatron-keye {options.command}: needs {error.name}; "
            "pip install 'megatron-keye[train]' brings what training needs",
            file=sys.stderr,
        )
        return USER_ERROR
    return status


def _make_parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {meaning}" for name, meaning in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="megatron-keye",
        usage="megatron-keye COMMAND [ARGUMENTS]",
        description="Training stack for Keye-VL-2.0.\n\ncommands:\n" + "\n".join(lines),
        epilog="megatron-keye COMMAND --help shows the arguments and examples of a command",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("command", nargs="?", metavar="COMMAND", help=argparse.SUPPRESS)
    return parser
