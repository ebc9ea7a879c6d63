# SPDX-License-Identifier: Apache-2.0
"""Every command in the documentation is marked, and its own parser takes it; none is run here."""

import argparse
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_keye.cli.main import main
from megatron_keye.config.settings import read_sections
from megatron_keye.recipes import load_recipe, recipe_names
from tests.support.doc_pages import PAGES, ROOT, blocks_of, commands_of, name_of

SETTINGS = {setting.name for section in read_sections() for setting in section.settings}
PLACEHOLDER_COUNT = "N"


class Parsed(BaseException):
    """The options that a command has parsed, thrown so that it does not run."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self.options = options


@pytest.fixture
def parse_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    parse = argparse.ArgumentParser.parse_args

    def parse_args(parser: argparse.ArgumentParser, *arguments: Any) -> argparse.Namespace:
        options = parse(parser, *arguments)
        if parser.prog != "megatron-keye":
            raise Parsed(options)
        return options

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    yield


def page_commands(page: Path, folder: Path) -> list[list[str]]:
    text = "".join(block.text for block in blocks_of(page) if block.has_commands)
    commands = commands_of(text, folder)
    return [["2" if word == PLACEHOLDER_COUNT else word for word in words] for words in commands]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_are_marked_with_what_shows_that_they_work(page: Path) -> None:
    for block in blocks_of(page):
        where = f"{name_of(page)}, line {block.line}"
        if block.mark is None:
            assert not block.has_commands, (
                f"{where}: put <!-- run: TEST -->, <!-- shown by: TEST --> or "
                "<!-- needs: MACHINE --> before this block (tests/support/doc_pages.py)"
            )
            continue
        assert block.has_commands or block.language == "python", f"{where}: a mark of no use"
        kind, text = block.mark
        if kind != "needs":
            file, _, function = text.partition("::")
            assert (ROOT / file).is_file(), f"{where}: there is no {file}"
            assert f"def {function}" in (ROOT / file).read_text() or not function, where


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_are_taken_by_their_own_parsers(
    page: Path, tmp_path: Path, parse_only: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in page_commands(page, tmp_path):
        options = parsed(words, monkeypatch)
        if options is not None:
            check_settings(options, " ".join(words))


def parsed(words: list[str], monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace | None:
    """Return the options of a command of this repository; None for a program of others."""
    match words:
        case ["megatron-keye", *arguments]:
            return options_of(main, arguments, words)
        case ["sbatch", *options] if "launch/slurm.sbatch" in options:
            at = options.index("launch/slurm.sbatch")
            return options_of(main, ["train", *options[at + 1 :]], words)
        case ["torchrun", *options] if "launch/train.py" in options:
            at = options.index("launch/train.py")
            return options_of(main, ["train", *options[at + 1 :]], words)
        case ["python", "-m", module, *arguments] if module.startswith("tools."):
            return tool_options(module, arguments, words, monkeypatch)
        case ["python", file, *arguments] if file.startswith("tools/"):
            module = file.removesuffix(".py").replace("/", ".")
            return tool_options(module, arguments, words, monkeypatch)
        case ["pytest", *arguments] | ["python", "-m", "pytest", *arguments]:
            missing = [a for a in arguments if a.startswith("tests/") and not (ROOT / a).exists()]
            assert not missing, words
        case ["make", *arguments]:
            targets = [word for word in arguments if "=" not in word]
            text = (ROOT / "Makefile").read_text()
            assert not [name for name in targets if f"\n{name}:" not in text], words
        case ["python", "-c" | "-m", *_] | ["python"]:
            pass
        case ["python" | "bash", file, *_] if not file.startswith("-"):
            assert (ROOT / file).exists() or "/" not in file, words
    return None


def tool_options(
    module: str, arguments: list[str], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> argparse.Namespace:
    tool = importlib.import_module(module)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    if not inspect.signature(tool.main).parameters:
        return options_of(lambda _: tool.main(), arguments, words)
    return options_of(tool.main, arguments, words)


def options_of(command: Any, arguments: list[str], words: list[str]) -> argparse.Namespace:
    try:
        command(arguments)
    except Parsed as stopped:
        return stopped.options
    except SystemExit as error:
        raise AssertionError(f"refused by its own parser: {' '.join(words)}") from error
    raise AssertionError(f"has run instead of being parsed: {' '.join(words)}")


def check_settings(options: argparse.Namespace, command: str) -> None:
    """Refuse unknown settings, and values and degrees that do not fit their recipe."""
    overrides = getattr(options, "set", None) or []
    unknown = {text.partition("=")[0] for text in overrides} - SETTINGS
    assert not unknown, f"{command}: unknown settings {sorted(unknown)}"
    recipe, num_ranks = getattr(options, "recipe", None), getattr(options, "ranks", None)
    if recipe in recipe_names() and isinstance(num_ranks, int):
        run = load_recipe(recipe)(num_ranks=num_ranks, has_gpu=True).with_overrides(overrides)
        run.check_num_ranks(num_ranks)
    elif recipe is not None and "." not in recipe:
        assert recipe in {*recipe_names(), "RECIPE"}, f"{command}: unknown recipe {recipe}"


@pytest.mark.parametrize(
    "command",
    [
        "megatron-keye train keye_tiny --rnks 2",
        "megatron-keye train keye_tiny --ranks 2 --set training.stepps=2",
        "megatron-keye train keye_tiny --ranks 2 --set parallel.decoder.tensor=4",
        "megatron-keye train keye_tinny",
        "python -m tools.benchmark_reads --outt x",
        "python tools/no_such_tool.py",
        "make no_such_target",
        "pytest tests/no_such_test.py",
    ],
)
def test_a_wrong_command_is_found(
    command: str, tmp_path: Path, parse_only: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    [words] = commands_of(command, tmp_path)
    with pytest.raises((AssertionError, ImportError, ValueError)):
        options = parsed(words, monkeypatch)
        if options is not None:
            check_settings(options, command)


def test_a_block_of_commands_is_known_by_its_words_or_its_fence(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# Title\n\n    A=1 .venv/bin/megatron-keye doctor\n\ntext\n\n"
        "    text -> tokens\n\n<!-- needs: 4 GPUs -->\n\n    FOUR='a b'\n    make x $FOUR\n\n"
        "<!-- needs: a cluster -->\n```bash\nsinfo\n```\n\n```json\n{}\n```\n"
    )
    blocks = blocks_of(page)
    assert [block.has_commands for block in blocks] == [True, False, True, True, False]
    assert [block.mark for block in blocks] == [
        None,
        None,
        ("needs", "4 GPUs"),
        ("needs", "a cluster"),
        None,
    ]
    assert commands_of(blocks[2].text, tmp_path) == [["make", "x", "a", "b"]]
