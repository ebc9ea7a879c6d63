# SPDX-License-Identifier: Apache-2.0
"""The configuration refuses invalid settings and states what is expected."""

import dataclasses
import json
from collections.abc import Iterator

import pytest

from megatron_keye.config import CheckpointConfig, DecoderParallel, HealthConfig, RunConfig
from megatron_keye.config.run import as_override
from megatron_keye.config.settings import read_sections
from megatron_keye.recipes import load_recipe, recipe_names
from tests.support.tiny import tiny_run


def test_json_gives_back_the_same_run() -> None:
    run = tiny_run(tensor=2, vision_ranks=3)
    assert RunConfig.from_json(run.to_json()) == run


def test_overrides_reach_every_kind_of_field() -> None:
    run = tiny_run().with_overrides(
        [
            "training.steps=9",
            "training.optimizer.learning_rate=1",
            "training.frozen=vision,projector",
            "training.recompute=full",
            "model.decoder.rope_sections=[4, 2, 2]",
            "data.samples=some file.jsonl",
            "name=7",
        ]
    )
    assert run.training.steps == 9
    assert run.training.optimizer.learning_rate == 1.0
    assert run.training.frozen == ("vision", "projector")
    assert run.training.recompute == "full"
    assert run.model.decoder.rope_sections == (4, 2, 2)
    assert run.data.samples == "some file.jsonl"
    assert run.name == "7"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.stepz=5", "training.stepz: no such field; did you mean steps?"),
        ("trainin.steps=5", "trainin: no such field; did you mean training or post_training?"),
        ("training=5", "training: is a section"),
        ("training.steps.more=5", "training.steps"),
        ("steps", "expected section.field=value"),
        ("training.steps=many", "expected a value of type int"),
        ("training.steps=2.5", "expected a value of type int"),
        ("training.steps=true", "expected a value of type int"),
        ("training.phase=warm", "expected one of"),
        ("training.frozen=encoder", "expected one of"),
        ("rollout.cache_quantization=int4", "expected one of"),
        ("model.decoder.rope_sections=[1,2]", "expected 3 values"),
        ("training.frozen=[vision", "expected one of"),
    ],
)
def test_a_wrong_override_is_one_sentence(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=".") as error:
        tiny_run().with_overrides([override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.decoder.tensor=8"], "parallel.decoder.tensor: got 8"),
        (["parallel.decoder.expert=3"], "parallel.decoder.expert: got 3"),
        (["parallel.decoder.pipeline=3"], "a multiple of parallel.decoder.pipeline = 3"),
        (["parallel.decoder.first_stage_layers=1"], "where parallel.decoder.pipeline is above 1"),
        (
            ["parallel.decoder.pipeline=3", "parallel.decoder.first_stage_layers=1"],
            "1 for the stages that parallel.decoder.first_stage_layers and last_stage_layers set, "
            "plus a multiple of the 2 others",
        ),
        (
            ["parallel.decoder.pipeline=2", "parallel.decoder.last_stage_layers=4"],
            "got 4, expected 4 for the stages",
        ),
        (
            ["parallel.decoder.pipeline=2", "parallel.decoder.last_stage_layers=1"]
            + ["parallel.decoder.virtual_stages=2"],
            "a divisor of each stage's layers, [3, 1]",
        ),
        (["parallel.decoder.virtual_stages=2"], "1 unless parallel.decoder.pipeline"),
        (["parallel.decoder.data=3"], "a divisor of 4 rows per step"),
        (["parallel.decoder.context=3"], "data.row_tokens"),
        (
            ["parallel.decoder.pipeline=2", "parallel.decoder.virtual_stages=2"]
            + ["training.rows_per_step=3"],
            "since the pipeline is interleaved",
        ),
        (["parallel.vision.num_ranks=1"], "the decoder's ranks encode"),
        (["parallel.vision.placement=dedicated"], "1 or more"),
        (["model.vision.hidden_size=18"], "row and column rotary"),
        (["model.decoder.head_dim=20"], "whose sum is head_dim / 2"),
        (["training.frozen=vision,projector,decoder,indexer"], "a part that still learns"),
        (["training.phase=indexer_warmup", "training.frozen=indexer"], "a part that still"),
        (["training.dense_up_to=-1"], "training.dense_up_to: got -1, expected 0 or more"),
        (
            ["training.dense_up_to=9", "training.phase=dense"],
            '0 unless training.phase is "sparse"',
        ),
        (["training.dense_up_to=64"], "less than data.row_tokens = 64"),
        (["data.frames.min_tokens_per_frame=999"], "data.frames.min_tokens_per_frame"),
        (["training.optimizer.min_learning_rate=9"], "min_learning_rate"),
        (
            ["rollout.cache_quantization=fp8", "rollout.server=http://localhost:1"],
            "rollout.cache_quantization: got 'fp8', expected 'none' with rollout.server",
        ),
        (["training.steps=0"], "training.steps: got 0, expected 1 or more, or training.epochs"),
        (["training.epochs=2"], "training.steps: got 8, expected 0, since training.epochs = 2"),
        (["training.epochs=NaN"], "training.epochs: got nan"),
        (["training.validation.num_rows=-1"], "training.validation.num_rows: got -1"),
        (["training.validation.min_delta=NaN"], "training.validation.min_delta: got nan"),
        (["training.validation.patience=2"], "training.validation.interval_steps: got 0"),
        (
            ["training.validation.patience=2", "training.validation.interval_steps=9"],
            "data.validation: got '', expected samples to validate on",
        ),
    ],
)
def test_invalid_combinations_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=".") as error:
        tiny_run().with_overrides(overrides)
    assert message in str(error.value)


def test_overrides_that_are_valid_only_together_are_applied() -> None:
    run = tiny_run().with_overrides(
        ["parallel.vision.num_ranks=2", "parallel.vision.placement=dedicated"]
    )
    assert run.parallel.num_ranks == 3


def test_the_number_of_started_ranks_must_be_the_product() -> None:
    tiny_run(tensor=2, vision_ranks=1).check_num_ranks(3)
    with pytest.raises(ValueError, match="3 ranks.*expected 4, the number of ranks"):
        tiny_run(tensor=2, vision_ranks=1).check_num_ranks(4)


@pytest.mark.parametrize(
    ("phase", "frozen", "trained"),
    [
        ("dense", (), ("vision", "projector", "decoder")),
        ("indexer_warmup", (), ("indexer",)),
        ("sparse", (), ("vision", "projector", "decoder", "indexer")),
        ("sparse", ("vision", "decoder"), ("projector", "indexer")),
    ],
)
def test_phase_and_frozen_parts_decide_what_learns(
    phase: str, frozen: tuple[str, ...], trained: tuple[str, ...]
) -> None:
    run = tiny_run(training={"phase": phase, "frozen": frozen})
    assert run.training.trained_parts == trained


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [
        ({"pipeline": 2}, [[range(6)], [range(6, 12)]]),
        ({"pipeline": 2, "last_stage_layers": 5}, [[range(7)], [range(7, 12)]]),
        (
            {"pipeline": 4, "first_stage_layers": 2, "last_stage_layers": 4},
            [[range(2)], [range(2, 5)], [range(5, 8)], [range(8, 12)]],
        ),
        (
            {"pipeline": 2, "virtual_stages": 2, "first_stage_layers": 4},
            [[range(2), range(6, 8)], [range(2, 6), range(8, 12)]],
        ),
    ],
)
def test_layers_are_split_over_virtual_stages(
    degrees: dict[str, int], expected: list[list[range]]
) -> None:
    decoder = DecoderParallel(**degrees)
    got = [
        [decoder.virtual_stage_layers(12, stage, index) for index in range(decoder.virtual_stages)]
        for stage in range(decoder.pipeline)
    ]
    assert got == expected


def test_rows_of_short_documents_alone_are_dense_up_to_the_setting() -> None:
    training = tiny_run(training={"dense_up_to": 34}).training
    assert [training.row_phase(longest) for longest in (1, 34, 35)] == ["dense", "dense", "sparse"]
    assert tiny_run().training.row_phase(1) == "sparse", "no row by default"
    for phase in ("dense", "indexer_warmup"):
        assert tiny_run(training={"phase": phase}).training.row_phase(1) == phase


def test_former_names_of_settings_are_read() -> None:
    run = tiny_run(pipeline=2, virtual_stages=2, data=2)
    written = run.to_json().replace('"virtual_stages"', '"chunks_per_stage"')
    assert written != run.to_json()
    assert RunConfig.from_json(written) == run
    with pytest.raises(ValueError, match=r"is called parallel\.decoder\.virtual_stages now"):
        run.with_overrides(["parallel.decoder.chunks_per_stage=1"])
    # Also where a setting has moved to another section.
    run = tiny_run(training={"health": HealthConfig(max_bad_steps=3)})
    tree = json.loads(run.to_json())
    tree["training"] |= {"health": {}, "max_skipped_steps": 3}
    assert RunConfig.from_json(json.dumps(tree)) == run


@pytest.mark.parametrize(("former", "now"), [("true", "full"), ("false", "none")])
def test_values_under_a_former_name_are_read(former: str, now: str) -> None:
    run = tiny_run(training={"recompute": now})
    written = run.to_json().replace(f'"recompute": "{now}"', f'"recompute_layers": {former}')
    assert written != run.to_json()
    assert RunConfig.from_json(written) == run


def leaves(node: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield the dotted name and the value of every setting of a run."""
    for field in dataclasses.fields(node):  # type: ignore[arg-type]
        value = getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        elif field.init:
            yield f"{prefix}{field.name}", value


@pytest.mark.parametrize("name", recipe_names())
def test_every_setting_can_be_set_as_messages_advise_it(name: str) -> None:
    run = load_recipe(name)(num_ranks=8, has_gpu=True)
    # Lists that are not empty, and a text that would be another type in JSON.
    run = run.with_overrides(["training.frozen=vision,projector", "name=7"])
    settings = dict(leaves(run))
    assert run.with_overrides([as_override(*each) for each in settings.items()]) == run
    for setting, value in settings.items():
        assert run.with_overrides([as_override(setting, value)]) == run, setting


def test_every_default_can_be_set_as_the_list_of_settings_prints_it() -> None:
    run = load_recipe("keye_30b_a3b")(num_ranks=8, has_gpu=True)
    plain = dict(leaves(run))
    for section in read_sections():
        for setting in section.settings:
            if setting.default is None or setting.name.startswith(("parallel.", "training.steps")):
                continue  # degrees are valid only together, 0 steps only with epochs
            text = "" if setting.default == '""' else setting.default
            changed = dict(leaves(run.with_overrides([f"{setting.name}={text}"])))
            shown = plain[setting.name]
            assert type(changed[setting.name]) is type(shown), setting.name
            again = run.with_overrides([as_override(setting.name, changed[setting.name])])
            assert dict(leaves(again)) == changed, setting.name


@pytest.mark.parametrize("text", ["4,2,2", "[4,2,2]", "[4, 2, 2]", "4, 2, 2"])
def test_a_list_is_written_with_or_without_brackets(text: str) -> None:
    run = tiny_run().with_overrides([f"model.decoder.rope_sections={text}"])
    assert run.model.decoder.rope_sections == (4, 2, 2)


@pytest.mark.parametrize("text", ["", "[]"])
def test_a_list_can_be_emptied(text: str) -> None:
    run = tiny_run(training={"frozen": ("vision",)})
    assert run.with_overrides([f"training.frozen={text}"]).training.frozen == ()


@pytest.mark.parametrize(
    ("settings", "exported"),
    [
        ({}, []),
        ({"export_every": 1}, [7]),
        ({"interval_steps": 2, "export_every": 1}, [2, 4, 6, 7]),
        ({"interval_steps": 2, "export_every": 2}, [4, 7]),
        ({"interval_steps": 3, "export_every": 9}, [7]),
    ],
    ids=str,
)
def test_every_nth_checkpoint_and_the_last_one_are_exported(
    settings: dict[str, int], exported: list[int]
) -> None:
    checkpoint = CheckpointConfig(**settings)
    assert [n for n in range(1, 8) if checkpoint.exports(n, is_last=n == 7)] == exported
