"""What the command lines have in common: form of the help, recipe and settings."""

import argparse
import os

from megatron_keye.config import RunConfig
from megatron_keye.errors import UserError
from megatron_keye.recipes import FORMS, load_recipe, recipe_names

_RECIPE_HELP = f"{FORMS}; names: {', '.join(recipe_names())}"


def make_parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """Return the parser of a command or a tool.

    Args:
        prog: What a user types in front of the arguments.
        description: Docstring of its module, whose lines --help keeps as they are.
    """
    return argparse.ArgumentParser(
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add RECIPE, the first argument, and --set."""
    parser.add_argument("recipe", metavar="RECIPE", help=_RECIPE_HELP)
    _add_settings(parser)


def add_recipe_option(parser: argparse.ArgumentParser, *, default: str | None = None) -> None:
    """Add --recipe, required unless there is a default, and --set."""
    parser.add_argument(
        "--recipe",
        metavar="RECIPE",
        required=default is None,
        default=default,
        help=f"gives the sizes: {_RECIPE_HELP}" + (f"; default: {default}" if default else ""),
    )
    _add_settings(parser)


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add --workers."""
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes; default: all cores",
    )


def chosen_workers(options: argparse.Namespace) -> int:
    """Return the processes that --workers asks for.

    Raises:
        UserError: When that is none.
    """
    if options.workers < 1:
        raise UserError(f"--workers: got {options.workers}, expected 1 or more")
    return int(options.workers)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="change one setting of the recipe; may be given often (megatron-keye settings)",
    )


def chosen_run(options: argparse.Namespace, *, num_ranks: int, has_gpu: bool) -> RunConfig:
    """Return the run that RECIPE and --set describe.

    Args:
        options: What a parser with `add_recipe` or `add_recipe_option` returned.
        num_ranks: Ranks that the recipe may choose its degrees for.
        has_gpu: By which the recipe chooses its precision.

    Raises:
        UserError: For an unknown recipe or setting.
    """
    recipe = load_recipe(options.recipe)
    return recipe(num_ranks=num_ranks, has_gpu=has_gpu).with_overrides(options.set)


def positive_integer(text: str) -> int:
    """Read the value of an option that counts; argparse tells the error."""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected 1 or more")
    return int(text)
