# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of any grid export to the same tensors, and a converted one trains on any grid."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_keye.checkpoint import training_checkpoint
from megatron_keye.checkpoint.convert.convert import Options, hf_to_native, native_to_hf
from megatron_keye.checkpoint.convert.synthetic import write_synthetic
from megatron_keye.checkpoint.convert.to_native import native_shapes
from megatron_keye.checkpoint.hf.safetensors_index import open_folder
from megatron_keye.checkpoint.optimizer_shards import optimizers_of, shards_of
from megatron_keye.config import ParallelConfig, RunConfig
from megatron_keye.config.megatron import decoder_config
from megatron_keye.decoder.virtual_stage import VirtualStage
from megatron_keye.model import build_model
from megatron_keye.optim.optimizer import JointOptimizer
from megatron_keye.optim.staged_adamw import MASTER
from megatron_keye.parallel.grid import build_grid
from megatron_keye.vision import VisionTower
from tests.support.ranks import run_on_ranks
from tests.support.released import released
from tests.support.tiny import mixed_rows, tiny_model, tiny_run
from tests.support.train import train

GRIDS = {
    "tensor": {"tensor": 2},
    "uneven pipeline": {"pipeline": 2, "first_stage_layers": 1},
    "expert": {"data": 2, "expert": 2},
    "interleaved": {"pipeline": 2, "virtual_stages": 2},
    "all": {"tensor": 2, "pipeline": 2, "expert": 2},
}


@pytest.mark.parametrize("degrees", GRIDS.values(), ids=GRIDS)
def test_what_a_grid_trained_is_exported_bit_for_bit(
    degrees: dict[str, int], tmp_path: Path
) -> None:
    run = tiny_run(**degrees)
    weights = train(run, [mixed_rows(0)], save_to=tmp_path).weights
    native = tmp_path / "tiny" / "checkpoints" / "step-00000001"
    for layout in ("fused", "per-expert"):
        native_to_hf(native, tmp_path / layout, Options(), layout=layout)
    fused = {name: entry.read() for name, entry in open_folder(tmp_path / "fused").items()}
    expected = released(weights, run)
    assert fused.keys() == expected.keys()
    assert not [name for name, t in expected.items() if not torch.equal(t, fused[name])]
    separate = open_folder(tmp_path / "per-expert")
    gate_up = fused["model.layers.3.mlp.experts.gate_up_proj"][1]
    gate, up = (
        separate[f"model.layers.3.mlp.experts.1.{kind}_proj.weight"].read()
        for kind in ("gate", "up")
    )
    assert torch.equal(torch.cat([gate, up]).T, gate_up)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a released checkpoint, hf, and its conversion, native."""
    folder = tmp_path_factory.mktemp("converted")
    write_synthetic(folder / "hf", tiny_model(), file_bytes=200_000)
    hf_to_native(folder / "hf", folder / "native", tiny_run(), Options())
    return folder


@pytest.mark.parametrize("degrees", GRIDS.values(), ids=GRIDS)
def test_a_converted_checkpoint_starts_any_grid(
    degrees: dict[str, int], converted: Path, tmp_path: Path
) -> None:
    run = tiny_run(**degrees, training={"precision": "bf16"})
    run = replace(run, output_dir=str(tmp_path))
    ranks = run.parallel.num_ranks
    assert all(run_on_ranks(ranks, _load_and_save, run.to_json(), converted / "native"))
    native_to_hf(tmp_path / "tiny" / "checkpoints" / "step-00000000", tmp_path / "hf", Options())
    got, expected = open_folder(tmp_path / "hf"), open_folder(converted / "hf")
    assert got.keys() == expected.keys()
    assert not [n for n, e in expected.items() if not torch.equal(e.read(), got[n].read())]


def _load_and_save(run_json: str, weights: Path) -> bool:
    """Load weights, save, and return whether all master weights equal them."""
    run = RunConfig.from_json(run_json)
    grid = build_grid(run.parallel)
    model = build_model(run, grid, torch.device("cpu"), uses_transformer_engine=False)
    optimizer = JointOptimizer(run, model, grid)
    training_checkpoint.load_weights(weights, run, model, optimizer, grid)
    training_checkpoint.save(
        run, model, optimizer, grid, training_checkpoint.Progress(step=0, updates=0, data={})
    )
    shards = [shard for inner in optimizers_of(optimizer) for shard in shards_of(inner)]
    return bool(shards) and all(
        torch.equal(shard.part_of(shard.weight).float(), shard.kept[MASTER].flatten())
        for shard in shards
    )


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            tiny_run(model=tiny_model(vocab_size=98)),
            r"tensor decoder.embedding.weight: got shape \[96, 32\]",
        ),
        (tiny_run(model=tiny_model(num_layers=2)), r"got shape \[4, .*expected \[2, .*--set"),
    ],
)
def test_weights_of_another_model_are_refused(
    run: RunConfig, message: str, converted: Path
) -> None:
    (refusal,) = run_on_ranks(1, _refusal, run.to_json(), converted / "native")
    assert re.search(message, refusal), refusal


def test_a_folder_that_is_not_a_checkpoint_is_refused(converted: Path) -> None:
    (refusal,) = run_on_ranks(1, _refusal, tiny_run().to_json(), converted / "hf")
    assert "got a Hugging Face folder" in refusal and "hf-to-native" in refusal


def _refusal(run_json: str, weights: Path) -> str:
    """Return the error of loading; a rank that raised would have to be restarted."""
    try:
        _load_and_save(run_json, weights)
    except ValueError as error:
        return str(error)
    return "nothing"


def test_the_full_size_modules_have_the_released_names_and_shapes() -> None:
    from megatron_keye.recipes import load_recipe

    run = load_recipe("keye_30b_a3b")(num_ranks=64, has_gpu=True)
    run = replace(run, parallel=ParallelConfig())
    (shapes,) = run_on_ranks(1, _module_shapes, run.to_json())
    expected = native_shapes(run.model)
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert total == 31_122_082_160
    assert shapes == expected


def _module_shapes(run_json: str) -> dict[str, tuple[int, ...]]:
    """Build all modules on the meta device and return the shapes, layers and experts stacked."""
    run = RunConfig.from_json(run_json)
    groups = build_grid(run.parallel).decoder
    config = decoder_config(run, on_gpu=False)
    with torch.device("meta"):
        stage = VirtualStage(run, config, groups, index=0, uses_transformer_engine=False)
        tower = VisionTower(run.model.vision, run.model.decoder.hidden_size)
    shapes = {f"vision.{name}": tuple(p.shape) for name, p in tower.named_parameters()}
    stacks: dict[str, list[tuple[int, ...]]] = {}
    for name, parameter in stage.named_parameters():
        assert parameter.is_meta, name
        name = re.sub(r"layers\.\d+\.", "layers.", f"decoder.{name}")
        name = name.replace(".experts.", ".experts.experts.")
        stacks.setdefault(name, []).append(tuple(parameter.shape))
    num_layers = run.model.decoder.num_layers
    for name, stack in stacks.items():
        assert len(set(stack)) == 1, f"{name} differs between layers"
        stacked = (num_layers,) if ".layers." in name else ()
        assert len(stack) == torch.Size(stacked).numel(), name
        shapes[name] = (*stacked, *stack[0])
    return shapes
