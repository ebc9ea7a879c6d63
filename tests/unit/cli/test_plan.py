# SPDX-License-Identifier: Apache-2.0
"""The plan agrees with the grid that training builds."""

import json
import time

import pytest

from megatron_keye.cli import plan, train
from megatron_keye.cli.arguments import chosen_run
from megatron_keye.cli.plan_table import describe
from megatron_keye.config import RunConfig
from megatron_keye.estimate.parameters import stage_layers
from megatron_keye.plan.places import decoder_place
from megatron_keye.recipes import load_recipe
from tests.support.tiny import tiny_run

GRIDS: list[RunConfig] = [
    tiny_run(),
    tiny_run(tensor=2, pipeline=2, expert=2),
    tiny_run(context=2, data=2, expert=4, vision_ranks=3),
    tiny_run(pipeline=2, virtual_stages=2, data=2),
    tiny_run(pipeline=3, first_stage_layers=2),
]


@pytest.mark.parametrize("run", GRIDS, ids=lambda run: run.parallel.describe())
def test_places_are_those_of_the_grid(run: RunConfig) -> None:
    for rank in range(run.parallel.decoder.num_ranks):
        place = vars(decoder_place(run.parallel.decoder, rank))
        assert plan.plan_ranks(run, None)[rank].place == place
        assert 0 <= place["expert"] < run.parallel.decoder.expert


@pytest.mark.parametrize("run", GRIDS, ids=lambda run: run.parallel.describe())
def test_every_layer_stands_on_one_stage(run: RunConfig) -> None:
    stages = range(run.parallel.decoder.pipeline)
    layers = [layer for stage in stages for layer in stage_layers(run, stage)]
    assert sorted(layers) == list(range(run.model.decoder.num_layers))


def test_parameters_of_all_ranks_add_up_when_nothing_is_repeated() -> None:
    made = plan.make_plan(tiny_run(pipeline=2, vision_ranks=1))
    assert sum(rank["parameters"] for rank in made["ranks"]) == made["parameters_total"]


def test_ranks_that_share_the_ends_hold_vision_and_their_part_of_its_state() -> None:
    shared = plan.plan_ranks(tiny_run(vision_ranks=2, shared_micro_batches=1), None)
    apart = plan.plan_ranks(tiny_run(vision_ranks=2), None)
    vision = apart[-1]
    assert shared[0].role == "decoder and vision"
    assert shared[0].parameters == apart[0].parameters + vision.parameters
    # Moments are divided by all that hold vision: three ranks, not two.
    assert shared[1].memory["optimizer"] * 3 == pytest.approx(vision.memory["optimizer"] * 2)
    assert shared[0].memory["optimizer"] == pytest.approx(
        apart[0].memory["optimizer"] + shared[1].memory["optimizer"]
    )


def test_text_names_ranks_and_layers() -> None:
    text = describe(plan.make_plan(GRIDS[3]))
    lines = [line.split() for line in text.splitlines() if "decoder and vision" in line]
    assert [(line[0], line[4], line[7:]) for line in lines] == [
        ("0-1", "0", ["0,", "2"]),
        ("2-3", "1", ["1,", "3"]),
    ]


def test_a_line_stands_for_all_ranks_that_are_alike(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--set",
        "parallel.vision.placement=dedicated",
        "--set",
        "parallel.vision.num_ranks=6",
    ]
    assert plan.main(["keye_30b_a3b", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    starts = [line.split()[0] for line in lines if " decoder   " in line or " vision   " in line]
    assert starts[-5:] == ["0-15", "16-31", "32-47", "48-63", "64-69"]


@pytest.mark.parametrize(
    ("ranks", "nearest"), [(65, "64 or 128"), (63, "64"), (100, "64 or 128"), (200, "192 or 256")]
)
def test_ranks_that_would_not_all_work_are_refused_with_the_nearest(
    ranks: int, nearest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan.main(["keye_30b_a3b", "--ranks", str(ranks)]) == 2
    message = capsys.readouterr().err
    assert f"--ranks: got {ranks}, expected {nearest}, since the degrees" in message
    assert "ranks; training would not start" in message


def test_a_wrong_setting_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["keye_30b_a3b", "--set", "parallel.decoder.tensor=3"]) == 2
    assert "parallel.decoder.tensor: got 3" in capsys.readouterr().err


@pytest.mark.parametrize("ranks", [64, 128])
def test_the_full_size_recipe_fits_its_ranks(ranks: int) -> None:
    run = load_recipe("keye_30b_a3b")(num_ranks=ranks, has_gpu=True)
    run.check_num_ranks(ranks)


def test_a_step_is_planned_with_its_idle_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["keye_tiny", "--ranks", "4", "--batch", ":1", "--suggest"]) == 0
    text = capsys.readouterr().out
    assert "step 1: " in text and "exchanges in order: features 0, gradients 0" in text
    assert "fewest rank-seconds: parallel.vision.num_ranks=" in text
    plan.main(["keye_tiny", "--ranks", "4", "--batch", ":1", "--json"])
    step = json.loads(capsys.readouterr().out)["step"]
    by_decoder = [rank["patches"] for rank in step["ranks"][:2]]
    by_vision = [rank["patches"] for rank in step["ranks"][2:]]
    assert by_decoder == [0, 0] and min(by_vision) > 0.5 * max(by_vision)
    assert all(0 <= rank["idle_share"] <= 1 for rank in step["ranks"])


@pytest.mark.parametrize(
    "wrong", [["--batch", "nostep"], ["--suggest"], ["--batch", "no.jsonl:0"]]
)
def test_a_wrong_batch_is_one_sentence(
    wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan.main(["keye_tiny", "--ranks", "4", *wrong]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("num_gpus", [64, pytest.param(512, marks=pytest.mark.slow)])
def test_layouts_are_found_in_seconds_and_shown_in_80_columns(
    num_gpus: int, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.process_time()
    assert plan.main(["keye_30b_a3b", "--gpus", str(num_gpus), "--suggest"]) == 0
    # 3 and 5 s on a core that nobody shares, and up to three times as much on one that others do.
    assert time.process_time() - began < 18
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert f"keye_30b_a3b on {num_gpus} h100: steps of " in text
    table = [line for line in text.splitlines() if line.endswith("%")]
    assert len(table) == 12 and 1 <= sum("*" in line for line in table) <= 3
    command = text[text.index("megatron-keye train") :].replace("\\\n", " ").split()
    assert command[2:5] == ["keye_30b_a3b", "--ranks", str(num_gpus)]
    options = train.parse_arguments(command[2:])
    chosen = chosen_run(options, num_ranks=num_gpus, has_gpu=True)
    chosen.check_num_ranks(num_gpus)


def test_layouts_of_a_batch_are_planned_for_its_rows(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["keye_tiny", "--gpus", "4", "--batch", ":0", "--json"]
    assert plan.main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["gpus"] == 4 and found["rates"]["matmul_tflops"]["source"].startswith("measured")
    first = found["layouts"][0]
    assert sum(first["parts"].values()) == pytest.approx(first["seconds"])


def test_a_run_that_generates_is_not_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["keye_tiny_rl", "--gpus", "2"]) == 2
    assert "generate answers first, which is not predicted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "4", "--ranks", "4"], "--ranks: got 4 beside --gpus 4"),
        (["--gpus", "4", "--labels", "4"], "--labels: got 4 beside --gpus 4"),
        (["--rates", "file.json"], "--rates: got no --gpus"),
        (["--gpu", "h200"], "--gpu: got no --gpus"),
        (["--gpus", "4", "--rates", "/no/file.json"], "cannot be read"),
        (["--gpus", "4", "--batch", "nostep"], "--batch: got 'nostep'"),
    ],
)
def test_options_that_do_not_fit_together_are_one_sentence(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan.main(["keye_tiny", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
