# SPDX-License-Identifier: Apache-2.0
"""The library equals the NumPy model of tests/support in every output and every gradient."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron_keye.verify.compare import compare
from tests.support.dumping import Arrays, dump_folder, mixed_inputs, numpy_row
from tests.support.hf_checkpoint import CONFIG, per_expert, random_weights, write_checkpoint
from tests.support.numpy_model import Array, run_model

TOLERANCES = {"fp64": 1e-12, "fp32": 5e-6}
STEP = 1e-5
"""Step of a central difference in float64, whose error is about 1e-9 of the third derivative."""


@pytest.fixture(scope="module")
def weights() -> dict[str, NDArray[np.float32]]:
    return random_weights(CONFIG)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, weights: dict[str, Any]) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("fused"), CONFIG, weights)


@pytest.fixture(scope="module")
def dumped(folder: Path) -> Arrays:
    """Return outputs and gradients in float64."""
    return dump_folder(folder, mixed_inputs(), gradients=True)


def numpy_dump(weights: dict[str, Any], dumped: Arrays, inputs: Arrays) -> Arrays:
    """Return what a dump without gradients holds, by NumPy."""
    row = numpy_row(inputs, dumped["position_ids"])
    wide = {name: weight.astype(np.float64) for name, weight in weights.items()}
    sparse = run_model(wide, CONFIG, row, is_sparse=True)
    dense = run_model(wide, CONFIG, row, is_sparse=False)
    sparse |= {"sparse_kl": sparse.pop("kl"), "warmup_kl": dense["kl"]}
    return {name: np.asarray(value) for name, value in sparse.items()}


def assert_same(ours: Arrays, theirs: Arrays, tolerance: float) -> None:
    """Fail with the name and index of the first array that deviates too much."""
    for deviation in compare(ours, theirs):
        assert deviation.is_within(tolerance), str(deviation)


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize("layout", ["fused", "per-expert"])
def test_the_whole_model_equals_numpy(
    tmp_path: Path, weights: dict[str, Any], precision: Any, layout: str
) -> None:
    stored = weights if layout == "fused" else per_expert(weights)
    inputs = mixed_inputs()
    ours = dump_folder(write_checkpoint(tmp_path, CONFIG, stored), inputs, precision)
    theirs = numpy_dump(weights, ours, inputs)
    assert set(ours) == {*theirs, "position_ids"}, "every output is compared"
    assert np.array_equal(ours["topk_indices"], theirs["topk_indices"]), "selected keys"
    assert_same(ours, theirs, TOLERANCES[precision])


def test_outputs_have_the_documented_types(dumped: Arrays) -> None:
    assert dumped["topk_indices"].dtype == np.int32, "selected keys"
    assert dumped["position_ids"].dtype == np.int64, "positions"
    assert dumped["lm_loss"].shape == (), "the loss is a number"
    assert dumped["hidden"].dtype == np.float64, "a float64 run stays in float64"


def test_every_tensor_has_three_gradients(dumped: Arrays, weights: dict[str, Any]) -> None:
    for name, weight in weights.items():
        for kind in ("lm", "sparse", "warmup"):
            gradient = dumped[f"grad.{kind}.{name}"]
            assert gradient.shape == weight.shape, f"{kind} gradient of {name}"


def directional(
    loss: Callable[[dict[str, Array]], float], weights: dict[str, Any], name: str
) -> tuple[Array, float]:
    """Return a random direction for one tensor and the slope of the loss along it."""
    generator = np.random.default_rng(sum(map(ord, name)))
    direction = generator.standard_normal(weights[name].shape)
    ends = []
    for step in (STEP, -STEP):
        moved = {n: weight.astype(np.float64) for n, weight in weights.items()}
        moved[name] += step * direction
        ends.append(loss(moved))
    return direction, (ends[0] - ends[1]) / (2 * STEP)


def slopes(
    kind: str, names: list[str], dumped: Arrays, weights: dict[str, Any]
) -> Iterator[tuple[str, float, float]]:
    """Yield each tensor's slope by the library's gradient and by differences of the NumPy loss."""
    row = numpy_row(mixed_inputs(), dumped["position_ids"])

    def loss(moved: dict[str, Array]) -> float:
        run = run_model(moved, CONFIG, row, is_sparse=kind != "warmup")
        return float(run["lm_loss"] if kind == "lm" else run["kl"].sum())

    for name in names:
        direction, expected = directional(loss, weights, name)
        yield name, float((dumped[f"grad.{kind}.{name}"] * direction).sum()), expected


def test_language_gradients_equal_differences(dumped: Arrays, weights: dict[str, Any]) -> None:
    for name, got, expected in slopes("lm", list(weights), dumped, weights):
        assert got == pytest.approx(expected, rel=1e-6, abs=1e-8), name


@pytest.mark.parametrize("kind", ["sparse", "warmup"])
def test_indexer_gradients_equal_differences(
    kind: str, dumped: Arrays, weights: dict[str, Any]
) -> None:
    names = [name for name in weights if ".sa_indexer." in name]
    for name, got, expected in slopes(kind, names, dumped, weights):
        assert got == pytest.approx(expected, rel=1e-6, abs=1e-8), name


def test_each_loss_trains_its_own_part(dumped: Arrays, weights: dict[str, Any]) -> None:
    for name in weights:
        is_indexer = ".sa_indexer." in name
        is_unused = "packing_position" in name
        for kind in ("lm", "sparse", "warmup"):
            learns = (kind == "lm") != is_indexer and not is_unused
            assert dumped[f"grad.{kind}.{name}"].any() == learns, f"{kind} of {name}"


def test_equal_scores_select_the_earliest_keys_and_nothing_is_forced(
    tmp_path: Path, weights: dict[str, Any]
) -> None:
    blind = {n: w * 0 if "sa_indexer.q_norm" in n else w for n, w in weights.items()}
    inputs = mixed_inputs()
    found = dump_folder(write_checkpoint(tmp_path, CONFIG, blind), inputs)["topk_indices"]
    bounds, top_k = inputs["cu_seqlens"], CONFIG["sa_config"]["topk"]
    for query in range(len(inputs["input_ids"])):
        start = int(bounds[np.searchsorted(bounds, query, side="right") - 1])
        expected = list(range(start, query + 1))[:top_k]
        padded = expected + [-1] * (top_k - len(expected))
        assert (found[:, query] == padded).all(), f"scores of query {query} are all +0 or -0"


def test_packed_documents_equal_separate_ones(folder: Path, dumped: Arrays) -> None:
    inputs = mixed_inputs()
    split = int(inputs["cu_seqlens"][1])
    alone: Arrays = {name: array for name, array in inputs.items() if name != "cu_seqlens"}
    text = {name: alone[name][split:] for name in ("input_ids", "targets")}
    alone |= {name: alone[name][:split] for name in ("input_ids", "targets")}
    first, second = dump_folder(folder, alone), dump_folder(folder, text)
    keys = second["topk_indices"]
    second["topk_indices"] = np.where(keys < 0, keys, keys + split)
    for name, axis in (("logits", 0), ("hidden", 1), ("position_ids", 1), ("topk_indices", 1)):
        joined = np.concatenate([first[name], second[name]], axis=axis)
        assert_same({name: dumped[name]}, {name: joined}, 1e-13)
    for name in ("sparse_kl", "warmup_kl"):
        assert_same({name: dumped[name]}, {name: first[name] + second[name]}, 1e-13)


def test_without_targets_only_activations_are_dumped(folder: Path, dumped: Arrays) -> None:
    inputs = {name: array for name, array in mixed_inputs().items() if name != "targets"}
    found = dump_folder(folder, inputs)
    assert set(found) == {
        *("logits", "image_embeds", "video_embeds", "hidden", "position_ids", "topk_indices")
    }
    assert_same({"logits": found["logits"]}, dumped, 1e-13)
