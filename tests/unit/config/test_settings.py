# SPDX-License-Identifier: Apache-2.0
"""The list of settings agrees with the dataclasses, and each has a docstring."""

import json

import pytest

from megatron_keye.config import RunConfig
from megatron_keye.config.settings import Setting, read_sections, select_sections
from megatron_keye.errors import UserError
from megatron_keye.recipes import load_recipe

SETTINGS = {setting.name: setting for section in read_sections() for setting in section.settings}


def leaves(tree: dict[str, object], path: str = "") -> set[str]:
    found = set()
    for name, value in tree.items():
        inside = isinstance(value, dict)
        found |= leaves(value, f"{path}{name}.") if inside else {path + name}
    return found


def test_every_setting_of_a_run_is_listed_once() -> None:
    run = load_recipe("keye_tiny")(num_ranks=1, has_gpu=False)
    assert leaves(json.loads(run.to_json())) == set(SETTINGS)
    assert sum(len(section.settings) for section in read_sections()) == len(SETTINGS)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_has_a_docstring(name: str) -> None:
    meaning = SETTINGS[name].meaning
    assert meaning.endswith("."), f"{name}: {meaning!r}"


def test_every_section_has_a_docstring() -> None:
    assert all(section.meaning.endswith(".") for section in read_sections())


@pytest.mark.parametrize(
    ("name", "kind", "default"),
    [
        ("name", "text", None),
        ("device", "auto or cpu or cuda", "auto"),
        ("data.feature_cache", "text", '""'),
        ("data.shuffles", "true or false", "true"),
        ("model.decoder.rope_sections", "3 x integer", "[16, 24, 24]"),
        ("training.frozen", "list of vision or projector or decoder or indexer", "[]"),
        ("training.optimizer.epsilon", "number", "1e-08"),
    ],
)
def test_types_and_defaults_are_in_words(name: str, kind: str, default: str | None) -> None:
    assert (SETTINGS[name].type, SETTINGS[name].default) == (kind, default)


def test_defaults_are_valid_values_of_set() -> None:
    run = load_recipe("keye_tiny")(num_ranks=1, has_gpu=False)
    given = [f"{s.name}={s.default}" for s in SETTINGS.values() if is_plain(s)]
    assert isinstance(run.with_overrides(given), RunConfig)


def is_plain(setting: Setting) -> bool:
    """Return whether the default is valid in the tiny recipe, whatever else it sets."""
    return setting.default not in (None, '""') and setting.name not in (
        "model.decoder.rope_sections",
        "training.steps",
    )


def test_a_prefix_selects_whole_names() -> None:
    names = [s.name for section in select_sections("parallel") for s in section.settings]
    assert "parallel.decoder.tensor" in names and "parallel.vision.placement" in names
    assert [s.name for s in select_sections("data.decode.backend")[0].settings] == [
        "data.decode.backend"
    ]
    assert [section.name for section in select_sections("data.frames")] == ["data.frames"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("trainin", "did you mean training"),
        ("training.step", "training.steps"),
        ("optimizer", "did you mean training.optimizer?"),
        ("learning_rate", "did you mean training.optimizer.learning_rate?"),
        ("data.frame", "data.frames"),
        ("xyzzy", "known are: data, data.decode"),
    ],
)
def test_an_unknown_name_is_refused_with_similar_ones(name: str, message: str) -> None:
    with pytest.raises(UserError, match="expected a section or a setting") as error:
        select_sections(name)
    assert message in str(error.value)
