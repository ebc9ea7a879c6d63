# SPDX-License-Identifier: Apache-2.0
"""The command's settings fit every recipe, and what it cannot do is refused in one sentence."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_keye.cli.arguments import chosen_run
from megatron_keye.cli.profile import few_layers, main, parse_arguments, step_settings
from megatron_keye.profiling.profile import read_profile
from megatron_keye.recipes import recipe_names

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_takes_the_settings_of_a_profile(recipe: str) -> None:
    options = parse_arguments([recipe, "--out", "runs/p", "--set", "post_training.kind=none"])
    whole = chosen_run(options, num_ranks=8, has_gpu=True)
    options.set += [*few_layers(2, 2, whole), *step_settings(options)]
    run = chosen_run(options, num_ranks=8, has_gpu=True)
    degrees = run.parallel.decoder
    assert run.parallel.num_ranks == degrees.context == degrees.expert == 2
    assert (run.model.decoder.num_layers, run.training.steps) == (2, 10)
    assert run.training.profiler.trace_steps == (8, 9, 10)
    assert run.training.profiler.is_for(1) and run.training.records_timeline


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["keye_tiny"],
        ["keye_tiny", "--out", "x", "--fit-vision"],
        ["keye_tiny", "--compare", "a", "b"],
    ],
)
def test_a_command_does_one_thing(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_arguments(words)
    assert "expected RECIPE with --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "post_training.kind=grpo"], "post_training.kind: got"),
        (["--layers", "5"], "--layers: got 5, expected at most 4, those of the model"),
        (["--set", "training.profiler.ranks=1"], "training.profiler is what profile sets itself"),
        (["--ranks", "2", "--set", "parallel.decoder.data=2"], "expected 2, the number of ranks"),
    ],
)
def test_what_does_not_fit_is_refused(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keye_tiny", "--out", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_profile_of_two_layers_is_written_and_equal_to_itself(tmp_path: Path) -> None:
    words = ["keye_tiny", "--out", str(tmp_path), "--layers", "2", "--warm-up", "1"]
    words += ["--steps", "2", "--traced", "2", "--set", "model.decoder.vocab_size=151936"]
    command = [sys.executable, "-m", "megatron_keye", "profile"]
    done = subprocess.run(
        [*command, *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    file = tmp_path / "profile.json"
    found = read_profile(file)
    (rank,) = found.ranks
    assert found.extrapolation is not None and found.extrapolation.whole_layers == 4
    assert found.step_seconds.count == found.num_traced == 2
    assert {"decoder.experts", "vocabulary", "optimizer"} <= {m.module for m in rank.modules}
    explained = sum(module.share for module in rank.modules) + rank.exposed_share
    assert explained == pytest.approx(1, abs=0.15)
    assert json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
    assert "<svg" in (tmp_path / "profile.html").read_text()
    assert not (tmp_path / "keye_tiny" / "profiler").exists()
    same = subprocess.run(
        [*command, "--compare", str(file), str(file)], capture_output=True, text=True, check=True
    )
    verdicts = {line.split()[-1] for line in same.stdout.splitlines()[1:-1]}
    assert verdicts <= {"none", "once"}
