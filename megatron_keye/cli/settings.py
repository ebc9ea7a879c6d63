# SPDX-License-Identifier: Apache-2.0
"""Lists the settings of a run: name, type, default and meaning of each.

    megatron-keye settings
    megatron-keye settings training.optimizer
    megatron-keye settings parallel.decoder.tensor
    megatron-keye settings --markdown > docs/settings.md

A setting is changed with --set NAME=VALUE; VALUE is JSON, or text without quotes.
"""

import argparse
import shutil
import sys
import textwrap
from collections.abc import Sequence

from megatron_keye.cli.arguments import make_parser
from megatron_keye.cli.status import reports_user_errors
from megatron_keye.config.settings import Section, Setting, select_sections

_MAX_COLUMNS = 100
_HEAD = """\
# Settings

Every setting of a run. `--set NAME=VALUE` changes one; VALUE is JSON, or text without quotes.
`megatron-keye settings [SECTION]` shows the same in a terminal. A setting without a default is set
by the recipe.

`megatron-keye settings --markdown > docs/settings.md` makes this page from the docstrings in
`megatron_keye/config/`.
"""


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser("megatron-keye settings", __doc__)
    parser.add_argument(
        "section",
        nargs="?",
        default="",
        metavar="SECTION",
        help="a section or a setting, such as data or parallel.decoder.tensor; default: all",
    )
    parser.add_argument("--markdown", action="store_true", help="print Markdown instead of text")
    return parser.parse_args(arguments)


@reports_user_errors
def main(arguments: Sequence[str]) -> int:
    """Print the settings and return the exit status."""
    options = parse_arguments(arguments)
    sections = select_sections(options.section)
    if options.markdown:
        sys.stdout.write(page_of(sections))
    else:
        columns = min(shutil.get_terminal_size().columns, _MAX_COLUMNS)
        sys.stdout.write(text_of(sections, columns))
    return 0


def text_of(sections: Sequence[Section], columns: int) -> str:
    """Return the settings as text, wrapped to `columns`."""
    parts = []
    for section in sections:
        title = f"{section.name}: {section.meaning}" if section.name else section.meaning
        parts.append(textwrap.fill(title, columns, break_on_hyphens=False))
        parts += [_entry(setting, columns) for setting in section.settings]
        parts.append("")
    return "\n".join(parts[:-1]) + "\n"


def _entry(setting: Setting, columns: int) -> str:
    default = "no default" if setting.default is None else f"default {setting.default}"
    indent = " " * 6
    meaning = textwrap.fill(
        setting.meaning,
        columns,
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )
    return f"  {setting.name}  ({setting.type}; {default})\n{meaning}"


def page_of(sections: Sequence[Section]) -> str:
    """Return the settings as a page of Markdown, a table per section."""
    return "\n".join([_HEAD, *map(_table, sections)])


def _table(section: Section) -> str:
    lines = [f"## {section.name or 'run'}", "", section.meaning, ""]
    if section.settings:
        lines += ["| setting | type | default | meaning |", "| --- | --- | --- | --- |"]
    for setting in section.settings:
        default = "" if setting.default is None else f"`{setting.default}`"
        cells = (f"`{setting.name}`", setting.type, default, setting.meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines).rstrip() + "\n"
