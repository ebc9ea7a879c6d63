"""Makes Markdown tables of the results that `pytest tests/kernels --benchmark` wrote.

    python tools/report_benchmarks.py docs/benchmarks/kernels_h100.jsonl

Prints one table per GPU, commit and command, with a line per measured case.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_keye.cli.arguments import make_parser
from megatron_keye.cli.status import report_error, reports_user_errors
from megatron_keye.errors import UserError

_KIBI = 1024
_MACHINE = ("gpu", "torch", "triton", "commit", "command")
_NEEDED = (*_MACHINE, "op", "impl", "median_us", "p10_us", "p90_us", "tflop_per_s", "shape")


@reports_user_errors
def main(arguments: Sequence[str]) -> int:
    """Print the tables and return the exit status."""
    parser = make_parser("tools/report_benchmarks.py", __doc__)
    parser.add_argument("files", type=Path, nargs="+", help="files with JSON lines")
    options = parser.parse_args(arguments)
    try:
        lines = [line for path in options.files for line in read_lines(path)]
    except OSError as error:
        return report_error(error)
    sys.stdout.write(tables(lines))
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
            missing = [name for name in _NEEDED if name not in line]
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}, line {number}: is not a JSON object ({error})") from error
        if missing:
            raise UserError(
                f"{path}, line {number}: lacks {', '.join(missing)}, expected what "
                "`pytest tests/kernels --benchmark` writes"
            )
        lines.append(line)
    return lines


def tables(lines: list[dict[str, Any]]) -> str:
    """Return Markdown: a table per run, below its GPU, versions and command."""
    runs: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for line in lines:
        runs.setdefault(tuple(line[name] for name in _MACHINE), []).append(line)
    return "\n".join(
        f"{gpu}, torch {torch}, Triton {triton}, commit {commit}; `{command}`\n\n{_table(of_run)}"
        for (gpu, torch, triton, commit, command), of_run in runs.items()
    )


def _table(lines: list[dict[str, Any]]) -> str:
    rows = [
        "| tokens | selection | operator | median (p10 to p90) | TFLOP/s | speed-up |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for line in lines:
        median, low, high = (_time(line[f"{name}_us"]) for name in ("median", "p10", "p90"))
        compared = f"{line['times_faster']:.2f}x {line['peer']}" if "peer" in line else ""
        speed = f"{line['tflop_per_s']:.0f}" if line["tflop_per_s"] else ""
        rows.append(
            f"| {_tokens(line['shape'])} | {line.get('selection', '')} | {line['op']}, "
            f"{line['impl']} | {median} ({low} to {high}) | {speed} | {compared} |"
        )
    return "\n".join(rows) + "\n"


def _tokens(shape: dict[str, int]) -> str:
    """Format the number of keys, after the batch size if there is one."""
    keys = shape["S"]
    text = f"{keys // _KIBI}K" if keys % _KIBI == 0 else str(keys)
    return f"{shape['B']} x {text}" if "B" in shape else text


def _time(microseconds: float) -> str:
    if microseconds < 1e3:
        return f"{microseconds:.0f} us"
    return f"{microseconds / 1e3:.2f} ms" if microseconds < 1e5 else f"{microseconds / 1e3:.0f} ms"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
