# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share: recipe, settings, counts, folders, --json."""

import argparse
import os
from pathlib import Path

from megatron_keye.config import RunConfig
from megatron_keye.errors import UserError
from megatron_keye.recipes import FORMS, load_recipe, recipe_names

_RECIPE_HELP = f"{FORMS}; names: {', '.join(recipe_names())}"


def make_parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """Return the parser of a command or a tool.

    Args:
        prog: What a user types in front of the arguments.
        description: Docstring of its module, whose line breaks --help keeps.
    """
    return argparse.ArgumentParser(
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_recipe(parser: argparse.ArgumentParser, *, is_optional: bool = False) -> None:
    """Add RECIPE, the first argument, and --set."""
    nargs = "?" if is_optional else None
    parser.add_argument("recipe", metavar="RECIPE", nargs=nargs, help=_RECIPE_HELP)
    add_settings(parser)


def add_recipe_option(parser: argparse.ArgumentParser, *, default: str | None = None) -> None:
    """Add --recipe, required unless there is a default, and --set."""
    parser.add_argument(
        "--recipe",
        metavar="RECIPE",
        required=default is None,
        default=default,
        help=f"recipe whose settings apply: {_RECIPE_HELP}"
        + (f"; default: {default}" if default else ""),
    )
    add_settings(parser)


def add_settings(
    parser: argparse.ArgumentParser, meaning: str = "change a setting of the recipe; repeatable"
) -> None:
    """Add --set."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help=f"{meaning}; megatron-keye settings lists all",
    )


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add --workers."""
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="worker processes; default: one per core",
    )


def add_count(
    parser: argparse.ArgumentParser, name: str, meaning: str, *, default: int | None = None
) -> None:
    """Add an option whose value is an integer of 1 or more."""
    shown = meaning if default is None else f"{meaning}; default: {default}"
    parser.add_argument(name, type=positive_integer, default=default, metavar="N", help=shown)


def add_folder(
    parser: argparse.ArgumentParser, name: str, meaning: str, *, required: bool = False
) -> None:
    """Add an option whose value is a folder."""
    parser.add_argument(name, type=Path, required=required, metavar="DIR", help=meaning)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add --json."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def chosen_workers(options: argparse.Namespace) -> int:
    """Return the number of processes that --workers asks for.

    Raises:
        UserError: When it is below 1.
    """
    if options.workers < 1:
        raise UserError(f"--workers: got {options.workers}, expected 1 or more")
    return int(options.workers)


def chosen_run(options: argparse.Namespace, *, num_ranks: int, has_gpu: bool) -> RunConfig:
    """Return the run that RECIPE and --set describe.

    Args:
        options: Parsed by a parser with `add_recipe` or `add_recipe_option`.
        num_ranks: Ranks for which the recipe chooses its degrees.
        has_gpu: Whether ranks have GPUs, for which the recipe chooses its precision.

    Raises:
        UserError: For an unknown recipe or setting.
    """
    recipe = load_recipe(options.recipe)
    return recipe(num_ranks=num_ranks, has_gpu=has_gpu).with_overrides(options.set)


def positive_integer(text: str) -> int:
    """Parse an integer of 1 or more.

    Raises:
        ArgumentTypeError: For any other text.
    """
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected 1 or more")
    return int(text)
