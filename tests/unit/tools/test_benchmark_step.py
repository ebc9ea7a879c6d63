# SPDX-License-Identifier: Apache-2.0
"""The benchmark of whole layers times what its lines say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.benchmark_step_cases import FUSIONS, Case, one_gpu_table, two_gpu_table

ROOT = Path(__file__).parents[3]


def test_two_gpus_split_rows_and_experts_on_both_sides() -> None:
    cases = list(two_gpu_table())
    assert len({case.peer() for case in cases}) == 2
    for case in cases:
        run = case.run("keye_30b_a3b", [], layers=2, has_gpu=True, ranks=2)
        degrees = run.parallel.decoder
        assert (degrees.context, degrees.expert, run.parallel.num_ranks) == (2, 2, 2)


def test_a_case_runs_a_few_layers_of_the_recipe_on_one_rank() -> None:
    case = Case(tokens=32_768, phase="dense", recompute="experts", without="norm")
    run = case.run("keye_30b_a3b", ["model.decoder.indexer.top_k=64"], layers=2, has_gpu=True)
    assert run.parallel.num_ranks == 1 and run.model.decoder.num_layers == 2
    assert run.model.decoder.hidden_size == 2048 and run.model.decoder.indexer.top_k == 64
    assert (run.training.phase, run.training.recompute) == ("dense", "experts")
    assert run.training.fusions.norm == "off" and run.training.fusions.router == "auto"
    packed = Case(tokens=1003, layout="packed").document_lengths()
    assert sum(packed) == 1003 and max(packed) - min(packed) == 1
    answers = Case(tokens=40_960, layout="answers").branches()
    assert answers.lengths.tolist() == [32_768, *[1024] * 8]
    assert answers.longest_path == 40_960 * 33 // 40, "as long as a row to compare with"


def test_answers_share_the_pairs_of_their_prompt() -> None:
    cases = [Case(tokens=4096, phase="dense", layout=layout) for layout in ("one", "answers")]
    one, answers = (
        case.layer_flops(case.run("keye_30b_a3b", [], layers=2, has_gpu=True)) for case in cases
    )
    # 8 answers of 102 tokens do not see each other: 28 pairs of them; 2 + 4 products, 2 layers.
    assert one - answers == 2 * 12 * 32 * 128 * 28 * 102**2


def test_the_table_has_each_fusion_off_by_itself_and_few_peers() -> None:
    cases = list(one_gpu_table())
    assert {case.without for case in cases} == {"", "all", *FUSIONS}
    assert len(set(cases)) == len(cases)
    assert len({case.peer() for case in cases}) == 8
    for case in cases:
        case.run("keye_30b_a3b", [], layers=2, has_gpu=True)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_it_runs_on_a_machine_without_a_gpu(ranks: int, tmp_path: Path) -> None:
    out = tmp_path / "step.jsonl"
    cases = ["--phases", "sparse", "dense", "--recompute", "selective"]
    cases += ["--layouts", "one", "answers"]
    words = ["--tokens", "96", *cases, "--repeats", "1", "--ranks", str(ranks)]
    command = [sys.executable, "-m", "tools.benchmark_step", *words, "--out", str(out)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("prove nothing of speed") == 1
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    ours = [(phase, layout) for phase in ("sparse", "dense") for layout in ("one", "answers")]
    plain = [] if ranks == 2 else [("plain", "one")]
    assert [(line["phase"], line["layout"]) for line in lines] == plain + ours
    assert all(line["step_ms"] > 0 and not line["proves_speed"] for line in lines)
    sparse = next(line for line in lines if line["phase"] == "sparse")
    assert sparse["union_keys"] > 0
