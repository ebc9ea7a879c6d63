# SPDX-License-Identifier: Apache-2.0
"""Breaks a run again and again, resumes it each time, and shows what was lost.

    python -m tools.break_run --faults 60
    python -m tools.break_run --faults 3 --seed 7 --kind "rank killed"
    python -m tools.break_run --list

Two small ranks train six steps and save every second one. Each trial starts them, brings about one
fault (a signal, a stopped or killed process, a damaged file, a full disk, a NaN, a second job),
waits for the end, resumes, and compares losses and weights with a run that nothing happened to, to
the last bit. Kinds come in turn; the seed decides rank and moment, so a trial can be repeated.

Prints a table; --out appends one JSON line a trial. Exit status: 0 if nothing was wrong, else 1.
"""

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_keye.cli.arguments import add_count, make_parser
from megatron_keye.cli.status import reports_user_errors
from tools.benchmark_lines import shared_fields, write_line
from tools.faults.kinds import KINDS
from tools.faults.subject import write_data
from tools.faults.trial import Trial, train_unbroken, try_fault

_COLUMNS = {
    "hangs": "hangs",
    "lost steps": "lost",
    "damaged results": "damaged",
    "left over": "left over",
    "tracebacks": "tracebacks",
    "silent": "silent",
    "cannot go on": "cannot go on",
    "other end": "expected",
}
"""Columns of the table, and the word that names each in `Trial.wrong`."""


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser("python -m tools.break_run", __doc__)
    add_count(parser, "--faults", "how many", default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the first fault; default: 0")
    parser.add_argument("--kind", choices=KINDS, action="append", help="only these; repeatable")
    parser.add_argument("--list", action="store_true", help="show the kinds of fault and exit")
    parser.add_argument("--folder", type=Path, help="where runs write; a failed one stays there")
    parser.add_argument("--out", type=Path, help="file to append JSON lines to")
    return parser.parse_args(arguments)


@reports_user_errors
def main(arguments: Sequence[str]) -> int:
    """Try all faults and return the exit status."""
    options = parse_arguments(arguments)
    if options.list:
        sys.stdout.write("\n".join(KINDS) + "\n")
        return 0
    folder = options.folder or Path(tempfile.mkdtemp(prefix="break_run"))
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "data"
    write_data(data)
    unbroken = train_unbroken(data, folder / "unbroken")
    kinds = options.kind or list(KINDS)
    trials = []
    for number in range(options.seed, options.seed + options.faults):
        kind = kinds[number % len(kinds)]
        trial = try_fault(kind, number, data, folder / f"trial-{number}", unbroken)
        trials.append(trial)
        write_line({"op": "fault", "seed": number, **asdict(trial)}, options.out)
    Console().print(table(trials))
    write_line(
        {
            "op": "faults",
            "trials": len(trials),
            **_counts(trials),
            **shared_fields("tools.break_run"),
        },
        options.out,
    )
    return int(any(trial.wrong for trial in trials))


def table(trials: Sequence[Trial]) -> Table:
    """Return a row for each kind of fault and one for all."""
    rows = Table(title=f"{len(trials)} faults")
    for name in ("fault", "trials", *_COLUMNS):
        rows.add_column(name, justify="left" if name == "fault" else "right")
    for kind in dict.fromkeys(trial.kind for trial in trials):
        of_kind = [trial for trial in trials if trial.kind == kind]
        rows.add_row(kind, str(len(of_kind)), *map(str, _counts(of_kind).values()))
    rows.add_section()
    rows.add_row("all", str(len(trials)), *map(str, _counts(trials).values()))
    return rows


def _counts(trials: Sequence[Trial]) -> dict[str, int]:
    """Return for each column how many things were wrong."""
    found = Counter(
        column
        for trial in trials
        for wrong in trial.wrong
        for column, word in _COLUMNS.items()
        if word in wrong.split(":")[0]
    )
    return {column: found[column] for column in _COLUMNS}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
