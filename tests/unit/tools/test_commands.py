# SPDX-License-Identifier: Apache-2.0
"""Each script that stands for a command runs it, and each tool's help is all that it prints."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

TOOLS = {
    "convert_checkpoint": "convert",
    "doctor": "doctor",
    "interleave_captions": "interleave",
    "plan_grid": "plan",
    "prepare_data": "prepare",
    "profile_throughput": "profile",
    "run_stages": "run_stages",
    "simulate_schedule": "simulate",
    "verify_checkpoint": "verify",
}


PARTS_OF_TOOLS = {
    "benchmark_clips",
    "benchmark_lines",
    "benchmark_tables",
    "site_pages",
    *(f"benchmark_step_{part}" for part in ("cases", "layers", "measure", "profile", "ranks")),
    *(f"benchmark_generate_{part}" for part in ("answers", "decode", "measure", "prefill")),
    "benchmark_generate_setup",
    "benchmark_optimizer_cases",
    "learn_small_scores",
}
"""Files that another one, or mkdocs, imports, without a command line."""


@pytest.mark.parametrize(("tool", "command"), TOOLS.items())
def test_a_tool_is_its_command(tool: str, command: str) -> None:
    of_tool = importlib.import_module(f"tools.{tool}").main
    assert of_tool is importlib.import_module(f"megatron_keye.cli.{command}").main


def test_the_launch_script_is_the_command() -> None:
    of_script = importlib.import_module("launch.train").main
    assert of_script is importlib.import_module("megatron_keye.cli.train").main


@pytest.mark.parametrize(
    "tool", sorted({path.stem for path in (ROOT / "tools").glob("*.py")} - PARTS_OF_TOOLS)
)
def test_help_is_all_that_a_tool_prints(tool: str, tmp_path: Path) -> None:
    environment = os.environ | {"CUDA_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, "-m", f"tools.{tool}", "--help"]
    done = subprocess.run(
        words, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ")
