# SPDX-License-Identifier: Apache-2.0
"""A recipe is found by its name, in a user's own file, or as the run.json of an earlier run."""

from pathlib import Path

import pytest

from megatron_keye.config import RunConfig
from megatron_keye.errors import UserError
from megatron_keye.post_training.check_run import check_run
from megatron_keye.recipes import Recipe, load_recipe, recipe_names
from megatron_keye.recipes.stages import CHAINS

OWN = """
from dataclasses import dataclass, replace

from megatron_keye.recipes.keye_tiny import keye_tiny


@dataclass
class Sizes:
    steps: "int" = 7


def own(*, num_ranks, has_gpu):
    run = keye_tiny(num_ranks=num_ranks, has_gpu=has_gpu)
    return replace(run, training=replace(run.training, steps=Sizes().steps))


def short(num_ranks, has_gpu):
    return own(num_ranks=num_ranks, has_gpu=has_gpu).with_overrides(["training.steps=1"])


def empty(*, num_ranks, has_gpu):
    return None


def narrow(num_ranks):
    return None


number = 3
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


def made(recipe: Recipe, num_ranks: int = 2) -> RunConfig:
    return recipe(num_ranks=num_ranks, has_gpu=False)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_of_the_package_makes_a_run_of_its_name(name: str) -> None:
    ranks = 2 if "tiny" in name or "two" in name else 64
    run = made(load_recipe(name), ranks)
    assert run.name == name
    run.check_num_ranks(ranks)


def test_the_package_has_these_recipes() -> None:
    stages = [name for chain in CHAINS.values() for name in chain]
    others = ["keye_30b_a3b", "keye_small", "keye_tiny", "keye_tiny_grounding", "keye_two_gpus"]
    rewarded = ["keye_small_rl", "keye_tiny_rl", "keye_two_gpus_rl", "keye_video_rl"]
    assert recipe_names() == sorted([*others, *rewarded, *stages])


@pytest.mark.parametrize(
    "name", ["keye_small_rl", "keye_tiny_rl", "keye_two_gpus_rl", "keye_video_rl"]
)
def test_recipes_that_learn_from_rewards_make_sense(name: str) -> None:
    run = made(load_recipe(name), 64)
    check_run(run)
    assert {"vision", "projector"}.isdisjoint(run.training.trained_parts)
    rows, video = run.data.row_tokens, run.data.frames.max_tokens_per_video
    assert "tiny" in name or "small" in name or video + run.rollout.max_new_tokens < rows


def test_a_users_file_names_its_function_or_is_named_like_it(own: Path) -> None:
    assert made(load_recipe(str(own))).training.steps == 7
    assert made(load_recipe(f"{own}:own")).training.steps == 7
    assert made(load_recipe(f"{own}:short")).training.steps == 1
    assert made(load_recipe(f"{own}:short"), 4).parallel.num_ranks == 4


def test_an_earlier_run_keeps_its_degrees(tmp_path: Path) -> None:
    run = made(load_recipe("keye_tiny"), 4)
    path = tmp_path / "run.json"
    path.write_text(run.to_json())
    assert made(load_recipe(str(path)), 1) == run


def test_an_unknown_name_is_refused_with_similar_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="got 'keye_tine'.*did you mean keye_tiny") as error:
        load_recipe("keye_tine")
    assert "FILE.py:FUNCTION, or the run.json of an earlier run" in str(error.value)
    with pytest.raises(UserError, match="got 'keye_tiny:keye_tiny'"):
        load_recipe("keye_tiny:keye_tiny")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.py", "gone.py, which does not exist, expected a Python file"),
        ("gone.py:own", "gone.py, which does not exist"),
        ("own.py:other", "own.py:other, expected a function of that name"),
        ("own.py:number", "own.py:number, expected a function of that name"),
        ("own.py:narrow", "own.py:narrow(num_ranks), expected a function that takes num_ranks"),
    ],
)
def test_a_wrong_file_or_function_is_refused(name: str, message: str, own: Path) -> None:
    with pytest.raises(UserError) as error:
        load_recipe(str(own.with_name(name)))
    assert message in str(error.value)


def test_a_function_that_returns_no_run_is_refused(own: Path) -> None:
    with pytest.raises(UserError, match="own.py:empty returned NoneType, expected a RunConfig"):
        made(load_recipe(f"{own}:empty"))


def test_an_error_in_a_users_file_keeps_its_traceback(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("raise KeyError('mine')")
    with pytest.raises(KeyError, match="mine"):
        load_recipe(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ("{}", "cannot be read"),
        ('{"nam": "x"}', "nam: no such field; did you mean name"),
    ],
)
def test_a_wrong_run_is_refused(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as error:
        load_recipe(str(path))
    assert str(path) in str(error.value) and message in str(error.value)
