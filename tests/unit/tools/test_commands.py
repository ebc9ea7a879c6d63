"""Each script that stands for a command runs it."""

import importlib

import pytest

TOOLS = {
    "convert_checkpoint": "convert",
    "doctor": "doctor",
    "plan_grid": "plan",
    "prepare_data": "prepare",
    "profile_throughput": "profile",
    "simulate_schedule": "simulate",
    "verify_checkpoint": "verify",
}


@pytest.mark.parametrize(("tool", "command"), TOOLS.items())
def test_a_tool_is_its_command(tool: str, command: str) -> None:
    of_tool = importlib.import_module(f"tools.{tool}").main
    assert of_tool is importlib.import_module(f"megatron_keye.cli.{command}").main


def test_the_launch_script_is_the_command() -> None:
    of_script = importlib.import_module("launch.train").main
    assert of_script is importlib.import_module("megatron_keye.cli.train").main
