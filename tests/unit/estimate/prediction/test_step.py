# SPDX-License-Identifier: Apache-2.0
"""Predicted times follow work, degrees and rates as they must, whatever the numbers are."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_keye.config import RunConfig
from megatron_keye.errors import UserError
from megatron_keye.estimate.prediction.exchanges import (
    Group,
    all_to_all_seconds,
    gather_seconds,
)
from megatron_keye.estimate.prediction.layer import Seconds, layer_seconds
from megatron_keye.estimate.prediction.machine import Machine, read_machine
from megatron_keye.estimate.prediction.machines import H100, MACHINES
from megatron_keye.estimate.prediction.mix import RowMix
from megatron_keye.estimate.prediction.step import Predictor
from megatron_keye.plan.slots import RowSizes
from megatron_keye.recipes import load_recipe

ROW = RowSizes([200_000, 60_000, 2_144], [1_024] * 400, num_padding=2_144, num_labels=4_096)


def run_with(*settings: str) -> RunConfig:
    return load_recipe("keye_30b_a3b")(num_ranks=64, has_gpu=True).with_overrides(list(settings))


def step_seconds(*settings: str, machine: Machine = H100) -> float:
    run = run_with(*settings)
    mix = RowMix([ROW] * run.training.rows_per_step, run)
    return Predictor(mix, machine).predict(run).seconds


def layer(*settings: str, machine: Machine = H100) -> dict[str, Seconds]:
    run = run_with(*settings)
    return layer_seconds(run, RowMix([ROW], run), machine)


def test_parts_add_up_to_the_step_and_waits_to_its_idle_share() -> None:
    run = run_with("parallel.vision.placement=dedicated", "parallel.vision.num_ranks=8")
    time = Predictor(RowMix([ROW] * 16, run), H100).predict(run)
    assert sum(time.parts.values()) == pytest.approx(time.seconds)
    assert all(seconds >= 0 for seconds in time.parts.values())
    assert time.idle_share == pytest.approx(
        (time.parts["pipeline idle"] + time.parts["waits for vision"]) / time.seconds
    )
    assert time.seconds >= max(time.vision_seconds, time.decoder_seconds)
    assert time.reason(1).split(" ")[-1].endswith("%")


def test_the_more_is_recomputed_the_longer_a_step_takes() -> None:
    times = [
        step_seconds(f"training.recompute={choice}")
        for choice in ("none", "experts", "selective", "full")
    ]
    assert times == sorted(times) and len(set(times)) == 4
    kept = step_seconds("parallel.vision.recompute=off")
    assert kept < step_seconds()


def test_context_ranks_share_the_work_and_tensor_ranks_repeat_the_indexer() -> None:
    base = ["parallel.decoder.tensor=1", "parallel.decoder.expert=1"]
    one, two = (layer(*base, f"parallel.decoder.context={n}") for n in (8, 16))
    for part in ("attention", "indexer", "experts", "linears", "elementwise"):
        assert two[part].forward == pytest.approx(one[part].forward / 2, rel=0.1), part
    split = layer("parallel.decoder.expert=1")
    assert split["attention"].total == pytest.approx(one["attention"].total / 2)
    assert split["indexer"].total > 0.7 * one["indexer"].total, "scores are not divided"
    assert split["tensor"].total > 0 == one["tensor"].total


def test_a_pipeline_idles_as_its_bubble_does() -> None:
    run = run_with()
    time = Predictor(RowMix([ROW] * 16, run), H100).predict(run)
    assert time.parts["pipeline idle"] == pytest.approx(3 / 16 * time.decoder_seconds)
    halved = run_with("parallel.decoder.virtual_stages=2")
    interleaved = Predictor(RowMix([ROW] * 16, run), H100).predict(halved)
    assert interleaved.parts["pipeline idle"] < 0.6 * time.parts["pipeline idle"]


@pytest.mark.parametrize("rate", ["matmul_tflops", "copy_gigabytes_per_second"])
def test_a_faster_machine_is_faster(rate: str) -> None:
    faster = replace(H100, **{rate: 2 * getattr(H100, rate)})
    assert 0.5 * step_seconds() < step_seconds(machine=faster) < step_seconds()


def test_exchanges_between_nodes_take_their_slower_links() -> None:
    inside, across = Group(8, 1), Group(16, 1)
    assert gather_seconds(1e9, Group(1, 1), H100) == 0
    assert gather_seconds(1e9, inside, H100) == pytest.approx(7 / 8 / 255, abs=1e-4)
    # Of 16 equal parts, 8 leave the node, through one card each.
    assert all_to_all_seconds(1e9, across, H100) == pytest.approx(0.5 / 40, abs=1e-4)
    apart = Group(2, 8)
    assert gather_seconds(1e9, apart, H100) == pytest.approx(0.5 / 40, abs=1e-4)


@pytest.mark.parametrize("machine", MACHINES.values(), ids=lambda machine: machine.name)
def test_every_rate_of_the_table_has_a_source(machine: Machine) -> None:
    rates = {n for n, v in vars(machine).items() if isinstance(v, float)}
    assert set(machine.sources) == rates
    kinds = ("measured: ", "assumed: ", "scaled from the H100: ", "from the data sheet: ")
    assert all(source.startswith(kinds) for source in machine.sources.values())


def test_measured_rates_replace_those_of_the_table(tmp_path: Path) -> None:
    file = tmp_path / "rates.json"
    file.write_text(json.dumps({"device": "GPU X", "rates": {"matmul_tflops": 500.0}}))
    machine = read_machine(file, H100)
    assert (machine.name, machine.matmul_tflops) == ("GPU X", 500.0)
    assert machine.copy_gigabytes_per_second == H100.copy_gigabytes_per_second
    assert machine.sources["matmul_tflops"] == "measured: rates.json"
    assert machine.sources["copy_gigabytes_per_second"] == "not measured: that of h100"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[1]", "without rates"),
        ('{"rates": {"matmul_flops": 1}}', "did you mean matmul_tflops"),
        ('{"rates": {"matmul_tflops": -1}}', "expected a number above 0"),
        ('{"rates": {"matmul_tflops": NaN}}', "expected a number above 0"),
        ('{"rates": {"matmul_tflops": true}}', "expected a number above 0"),
    ],
)
def test_a_file_that_has_no_rates_is_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "rates.json"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        read_machine(file, H100)
