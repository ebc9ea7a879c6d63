# SPDX-License-Identifier: Apache-2.0
"""The package names what a user needs, and imports nothing heavy before that is used."""

import subprocess
import sys
from pathlib import Path

import pytest

import megatron_keye

LIGHT = ("RunConfig", "UserError", "load_recipe", "recipe_names", "__version__")


def test_every_public_name_is_there() -> None:
    for name in megatron_keye.__all__:
        assert getattr(megatron_keye, name) is not None, name
    assert set(megatron_keye.__all__) <= set(dir(megatron_keye))
    assert megatron_keye.Trainer.__module__ == "megatron_keye.training.trainer"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Trainr'"):
        megatron_keye.Trainr  # noqa: B018


def test_configuration_and_recipes_need_no_torch() -> None:
    code = (
        f"import sys; from megatron_keye import {', '.join(LIGHT)}; "
        "load_recipe('keye_tiny')(num_ranks=1, has_gpu=False); "
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_package_is_marked_as_typed() -> None:
    assert (Path(megatron_keye.__file__).with_name("py.typed")).is_file()
