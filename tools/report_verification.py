# SPDX-License-Identifier: Apache-2.0
"""Makes docs/verification.md: what was checked against what, where and when, and what never ran.

    python -m tools.report_verification
    python -m pytest -m gpu --junitxml results.xml
    python -m tools.report_verification --record results.xml --machine "4 x NVIDIA H100" \\
        --command "python -m pytest -m gpu" --note "NCCL, Transformer Engine 2.20.2"

Reads docs/verification/checks.toml, which is written by hand, docs/verification/runs.jsonl, one
line for each run of tests on a machine with GPUs, the tests' own marks, and the JSON lines of
docs/benchmarks. --record adds a line for the results of a run before.
"""

import argparse
import ast
import json
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_keye.cli.arguments import make_parser
from megatron_keye.cli.status import reports_user_errors
from megatron_keye.errors import UserError
from tools.report_benchmarks import device_of

ROOT = Path(__file__).resolve().parents[1]
PAGE = Path("docs/verification.md")
CHECKS = Path("docs/verification/checks.toml")
RUNS = Path("docs/verification/runs.jsonl")


@reports_user_errors
def main(arguments: Sequence[str]) -> int:
    """Write the page and return the exit status."""
    options = _parse(arguments)
    if options.record is not None:
        line = recorded(options.record, options.machine, options.command, options.note)
        with (ROOT / RUNS).open("a") as file:
            file.write(json.dumps(line) + "\n")
    (ROOT / PAGE).write_text(page(ROOT))
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = make_parser("tools/report_verification.py", __doc__)
    parser.add_argument("--record", type=Path, metavar="XML", help="results of pytest --junitxml")
    for name, meaning in (
        ("--machine", "number and name of the GPUs that ran it"),
        ("--command", "what was run"),
        ("--note", "libraries and conditions of the run"),
    ):
        parser.add_argument(name, default="", metavar="TEXT", help=f"{meaning}; with --record")
    options = parser.parse_args(arguments)
    if options.record is not None and not (options.machine and options.command):
        parser.error("--record needs --machine and --command")
    return options


def recorded(xml: Path, machine: str, command: str, note: str) -> dict[str, Any]:
    """Return the line for a run's results: counts, and the files of which a test ran.

    Args:
        xml: Written by `pytest --junitxml`.
        machine: Number and name of its GPUs.
        command: What was run.
        note: Libraries and conditions.

    Raises:
        UserError: When the file holds no results, or none of a test that ran.
    """
    try:
        cases = list(ElementTree.parse(xml).iter("testcase"))
    except (OSError, ElementTree.ParseError) as error:
        raise UserError(f"{xml}: cannot be read ({error}), expected pytest --junitxml") from error
    outcomes = [_outcome(case) for case in cases]
    files = {
        case.get("classname", "").replace(".", "/") + ".py"
        for case, outcome in zip(cases, outcomes, strict=True)
        if outcome != "skipped"
    }
    if not files:
        raise UserError(f"{xml}: got {len(cases)} tests, none of which ran; nothing is recorded")
    commit = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(commit, cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "machine": machine,
        "commit": done.stdout.strip() or "unknown",
        "date": datetime.now(UTC).date().isoformat(),
        "command": command,
        "files": sorted(files),
        **{name: outcomes.count(name) for name in ("passed", "failed", "skipped")},
        "note": note,
    }


def _outcome(case: ElementTree.Element) -> str:
    kinds = {child.tag for child in case}
    return (
        "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
    )


def page(root: Path) -> str:
    """Return the page's text.

    Args:
        root: Folder of the repository.

    Raises:
        UserError: When a check names a test that is not there.
    """
    checks = tomllib.loads((root / CHECKS).read_text())
    runs = [json.loads(line) for line in (root / RUNS).read_text().splitlines()]
    gpu_tests = _marked(root, "gpu") - _marked(root, "benchmark")
    for check in checks["checks"]:
        for test in check["tests"]:
            if not (root / test).is_file():
                raise UserError(f"{CHECKS}: got {test}, expected the path of a test; mend it")
    return "\n".join(
        [
            "# What is proved",
            "",
            "Made by `python -m tools.report_verification` from `docs/verification/` and the",
            "JSON lines of `docs/benchmarks/`. All tests but those marked `gpu` run on CPUs with",
            "gloo, in CI at every commit; on GPUs ran what stands under",
            "[Runs on GPUs](#runs-on-gpus).",
            "",
            "## Checks",
            "",
            *_checks(checks["checks"], runs),
            "",
            "## Runs on GPUs",
            "",
            *_runs(runs),
            "",
            "## Never run",
            "",
            *(f"- {each['what']}." for each in checks["never"]),
            "",
            "GPU tests without a recorded run:",
            "",
            *_unrecorded(gpu_tests, runs),
            "",
            "## Measured",
            "",
            "What the lines say: [Measured](benchmarks/README.md).",
            "",
            *_measured(root),
            "",
        ]
    )


def _checks(checks: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = ["| what | against what | within | tests | ran on |", "| --- | --- | --- | --- | --- |"]
    for check in checks:
        machines = dict.fromkeys(
            run["machine"] for run in runs if set(run["files"]) & set(check["tests"])
        )
        tests = ", ".join(f"`{test}`" for test in check["tests"])
        ran = "; ".join(["CPU, CI", *machines])
        rows.append(
            f"| {check['what']} | {check['against']} | {check['within']} | {tests} | {ran} |"
        )
    return rows


def _runs(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [
        "| machine | commit | date | command | passed | failed | skipped | what |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for run in runs:
        command = f"`{run['command']}`" if run["command"] else "not recorded"
        counts = " | ".join(str(run[name]) for name in ("passed", "failed", "skipped"))
        rows.append(
            f"| {run['machine']} | {run['commit']} | {run['date']} | {command} | {counts} | "
            f"{run['note']} |"
        )
    return rows


def _unrecorded(gpu_tests: set[str], runs: Sequence[Mapping[str, Any]]) -> list[str]:
    rest = sorted(gpu_tests - {file for run in runs for file in run["files"]})
    return [f"- `{name}`" for name in rest] or ["- none"]


def _marked(root: Path, mark: str) -> set[str]:
    """Return the files of tests that use a mark of pytest."""
    return {
        path.relative_to(root).as_posix()
        for path in (root / "tests").rglob("test_*.py")
        if f"mark.{mark}" in (source := path.read_text())
        and any(
            isinstance(node, ast.Attribute) and ast.unparse(node) == f"pytest.mark.{mark}"
            for node in ast.walk(ast.parse(source))
        )
    }


def _measured(root: Path) -> list[str]:
    rows = [
        "| lines | of | device | commits | commands |",
        "| --- | --- | --- | --- | --- |",
    ]
    for path in sorted((root / "docs/benchmarks").glob("*.jsonl")):
        lines = [json.loads(text) for text in path.read_text().splitlines()]
        commits, commands = (
            dict.fromkeys(str(line[name]).strip() for line in lines if name in line)
            for name in ("commit", "command")
        )
        devices = dict.fromkeys(map(device_of, lines))
        rows.append(
            f"| {len(lines)} | `{path.name}` | {', '.join(devices)} | {', '.join(commits)} | "
            f"{'; '.join(f'`{command}`' for command in commands)} |"
        )
    return rows


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
