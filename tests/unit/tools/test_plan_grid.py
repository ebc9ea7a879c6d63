# SPDX-License-Identifier: Apache-2.0
"""The tool is the command `plan`: quick, without torch, and from any folder."""

import json
import subprocess
import sys
from pathlib import Path

from tools import plan_grid

TOOL = Path(plan_grid.__file__)


def test_json_has_the_released_counts() -> None:
    command = [sys.executable, "-P", str(TOOL), "keye_30b_a3b", "--json"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    plan = json.loads(answer.stdout)
    assert plan["parameters_total"] == 31_122_082_160
    assert plan["parameters_decoder"] == 30_532_122_624
    assert plan["parameters_vision"] == 450_735_984
    assert plan["parameters_projector"] == 30_686_720
    assert plan["parameters_indexer"] == 108_536_832
    assert plan["num_ranks"] == len(plan["ranks"]) == 64


def test_torch_is_not_imported() -> None:
    code = "import sys; sys.path[0] = sys.argv[1]; import tools.plan_grid; print(*sys.modules)"
    command = [sys.executable, "-c", code, str(TOOL.parents[1])]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "torch" not in answer.stdout.split()
