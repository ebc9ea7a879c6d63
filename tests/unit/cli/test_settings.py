# SPDX-License-Identifier: Apache-2.0
"""The list of settings is complete in the terminal, and its page in docs/ is current."""

from pathlib import Path

import pytest

from megatron_keye.cli.settings import main, page_of
from megatron_keye.config.settings import read_sections

PAGE = Path(__file__).parents[3] / "docs" / "settings.md"


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == page_of(read_sections()), (
        "a setting has changed; run: megatron-keye settings --markdown > docs/settings.md"
    )


def test_all_settings_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    for section in read_sections():
        for setting in section.settings:
            assert f"  {setting.name}  (" in text


def test_one_section_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["training.checkpoint"]) == 0
    text = capsys.readouterr().out
    assert "  training.checkpoint.keep  (integer; default 2)\n      Newest checkpoints" in text
    assert "training.steps" not in text and max(map(len, text.splitlines())) <= 100


def test_an_unknown_section_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["training.optimiser"]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: settings: got 'training.optimiser'")
    assert "did you mean training.optimizer" in errors and errors.count("\n") == 1


def test_bars_do_not_break_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--markdown"]) == 0
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("|"):
            assert line.replace("\\|", "").count("|") == 5, line
