# SPDX-License-Identifier: Apache-2.0
"""Makes Markdown tables of the JSON lines that benchmarks wrote.

    python -m tools.report_benchmarks docs/benchmarks/kernels_h100.jsonl
    python -m tools.report_benchmarks --pages docs/benchmarks

Prints one table for each run: one machine, set of versions, commit and command. What is the same
in all lines of a run stands above its table. With --pages it writes a page for each device of the
files of that folder into the folder instead.
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_keye.cli.arguments import make_parser
from megatron_keye.cli.status import report_error, reports_user_errors
from megatron_keye.errors import UserError
from tools.benchmark_tables import run_table

_RUN = ("torch", "triton", "commit", "command")
"""What a run has one of, where its lines say it."""
_NEEDED = "commit"
_DEVICES = ("gpu", "device")
"""Fields that name a device; without one it was the processor."""
_CPU = "CPU"
_ABOUT = """Every line of the files beside this page, which
`python -m tools.report_benchmarks --pages docs/benchmarks` makes. Operators and layers have the
sizes of `keye_30b_a3b` where a table does not say otherwise. What it means: [Measured](README.md).
"""
_TOLD_ELSEWHERE = ("faults.jsonl", "steps_measured.jsonl")
"""Files whose lines are in docs/faults.md and docs/plan.md."""


@reports_user_errors
def main(arguments: Sequence[str]) -> int:
    """Print the tables, or write the pages, and return the exit status."""
    parser = make_parser("tools/report_benchmarks.py", __doc__)
    parser.add_argument("files", type=Path, nargs="*", help="files with JSON lines")
    parser.add_argument("--pages", type=Path, metavar="DIR", help="write the pages of this folder")
    options = parser.parse_args(arguments)
    if bool(options.files) == (options.pages is not None):
        parser.error("expected files, or --pages with a folder")
    try:
        if options.pages is None:
            lines = [line for path in options.files for line in read_lines(path)]
            sys.stdout.write(tables(lines))
            return 0
        for name, text in pages(options.pages).items():
            (options.pages / name).write_text(text)
    except OSError as error:
        return report_error(error)
    return 0


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the lines of one file.

    Raises:
        UserError: For a line that is no JSON object or lacks a field, naming file and line.
    """
    lines = []
    for number, text in enumerate(path.read_text().splitlines(), start=1):
        try:
            line = json.loads(text)
            is_known = _NEEDED in line
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}, line {number}: is not a JSON object ({error})") from error
        if not is_known:
            raise UserError(
                f"{path}, line {number}: lacks {_NEEDED}, expected what a benchmark of "
                "tests/kernels or of tools/ writes"
            )
        lines.append(line)
    return lines


def tables(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return Markdown: a table per run, below its device, versions and command."""
    runs: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for line in lines:
        key = (device_of(line), *(str(line.get(name, "")).strip() for name in _RUN))
        runs.setdefault(key, []).append(line)
    return "\n".join(run_table(of_run, device_of(of_run[0])) for of_run in runs.values())


def pages(folder: Path) -> dict[str, str]:
    """Return the text of the page of each device that the files of a folder tell of, by name."""
    by_device: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        if path.name in _TOLD_ELSEWHERE:
            continue
        lines = read_lines(path)
        for device in dict.fromkeys(map(device_of, lines)):
            text = tables([line for line in lines if device_of(line) == device])
            by_device.setdefault(device, []).append(f"\n## {path.name}\n\n{text}")
    return {
        f"{_slug(device)}.md": f"# Measured on {_shown(device)}\n\n{_ABOUT}{''.join(sections)}"
        for device, sections in by_device.items()
    }


def device_of(line: Mapping[str, Any]) -> str:
    """Return the device on which a line was measured."""
    return next((str(line[name]) for name in _DEVICES if name in line), _CPU)


def _shown(device: str) -> str:
    return "a CPU" if device == _CPU else device


def _slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
