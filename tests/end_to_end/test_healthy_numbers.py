# SPDX-License-Identifier: Apache-2.0
"""A run whose numbers go bad keeps its good checkpoints, says why, and can go back by itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 240

FAULT = """
import os
if os.environ.get("RANK") == "1":
    import torch
    from megatron_keye.optim.optimizer import JointOptimizer
    finish, update = JointOptimizer.finish_gradients, JointOptimizer.update
    calls = {"finish": 0, "update": 0}
    def poisoned_moment(self, divisor):
        calls["finish"] += 1
        if calls["finish"] == 3:
            inner = self.vision.chained_optimizers[0].optimizer
            next(iter(inner.state.values()))["exp_avg"].view(-1)[0] = torch.nan
        return finish(self, divisor)
    def poisoned_weight(self, rate, norm):
        update(self, rate, norm)
        calls["update"] += 1
        if calls["update"] == 4:
            self.vision.get_parameters()[0].detach().view(-1)[0] = torch.nan
    JointOptimizer.finish_gradients = poisoned_moment
    JointOptimizer.update = poisoned_weight
"""
"""Python imports it at its start, as sitecustomize: a moment of the vision rank becomes NaN in the
third step, and later a weight right before it is saved."""
SETTINGS = (
    *("device=cpu", "training.steps=6", "training.rows_per_step=1"),
    *("training.checkpoint.interval_steps=1", "training.health.max_bad_steps=1"),
    "training.health.after_bad_steps=roll_back",
)


def train(folder: Path, *arguments: str, path: str = "") -> subprocess.CompletedProcess[str]:
    options = [part for setting in SETTINGS for part in ("--set", setting)]
    command = [sys.executable, "-m", "megatron_keye", "train", "keye_tiny", "--ranks", "2"]
    return subprocess.run(
        [*command, "--set", f"output_dir={folder}", *options, *arguments],
        env=os.environ | {"PYTHONPATH": f"{path}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


@pytest.mark.slow
def test_a_run_goes_back_past_a_bad_step_and_saves_no_sick_state(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(FAULT)
    result = train(tmp_path, path=f"{tmp_path}:")
    folder = tmp_path / "keye_tiny"
    assert f"went back to {folder / 'checkpoints' / 'step-00000002'}" in result.stderr
    (file,) = (folder / "bad_steps").iterdir()
    bad = json.loads(file.read_text())
    assert bad["sick_ranks"] == {"first moments": [1]} and not bad["was_applied"]
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [each["step"] for each in steps] == [1, 2, 3, 4], "the bad one is forgotten"
    assert all(each["was_applied"] for each in steps)

    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: step 4: no checkpoint was saved"), result.stderr
    assert "(rank 1), expected none" in error and "step-00000003 stays" in error
    assert sorted(os.listdir(folder / "checkpoints")) == ["step-00000002", "step-00000003"]

    # Without the fault that step is healthy.
    again = train(tmp_path, "--replay", str(file))
    assert again.returncode == 0, again.stderr
    loss = f"loss {bad['loss']:.6g} (was {bad['loss']:.6g})"
    assert again.stdout.startswith(f"step 3 with the weights after step 2: {loss}")
    assert again.stdout.strip().endswith("all numbers finite")
    assert sorted(os.listdir(folder / "checkpoints")) == ["step-00000002", "step-00000003"]
