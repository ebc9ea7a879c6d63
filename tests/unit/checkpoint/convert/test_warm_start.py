# SPDX-License-Identifier: Apache-2.0
"""A warm start takes each tensor from the folder that has it and initializes the rest."""

import json
from pathlib import Path

import pytest
import torch

from megatron_keye.checkpoint.convert.convert import Options, native_to_hf
from megatron_keye.checkpoint.convert.synthetic import write_noise
from megatron_keye.checkpoint.convert.warm_start import ORIGINS, warm_start
from megatron_keye.checkpoint.hf.parameter_shapes import parameter_shapes, part_of
from megatron_keye.checkpoint.hf.safetensors_index import open_folder
from megatron_keye.errors import UserError
from tests.support.tiny import tiny_run

RUN = tiny_run()
VISION = "visual.vision_model."
SHAPES = parameter_shapes(RUN.model, "per-expert")
DTYPE = torch.bfloat16


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    shapes = {name: shape for name, shape in SHAPES.items() if part_of(name) == "decoder"}
    write_noise(tmp_path / "qwen", shapes, dtype=DTYPE, file_bytes=100_000)
    config = {"model_type": "qwen3_moe", "hidden_size": 32, "rope_scaling": None}
    config |= {"num_experts_per_tok": 2, "norm_topk_prob": True}
    (tmp_path / "qwen" / "config.json").write_text(json.dumps(config))
    return tmp_path / "qwen"


def write_vision_config(folder: Path, **vision: object) -> None:
    config = {"model_type": "siglip", "vision_config": vision, "text_config": {"vocab_size": 7}}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def siglip(tmp_path: Path) -> Path:
    """Return a folder with SigLIP's names, its text model and its pooling head."""
    seen = {n.removeprefix("visual."): s for n, s in SHAPES.items() if part_of(n) == "vision"}
    seen |= {"vision_model.head.probe": (1, 1, 16), "text_model.final_layer_norm.weight": (16,)}
    write_noise(tmp_path / "siglip", seen, dtype=DTYPE, file_bytes=10_000)
    write_vision_config(tmp_path / "siglip", num_attention_heads=2)
    return tmp_path / "siglip"


def test_each_tensor_comes_from_where_the_report_says(
    qwen: Path, siglip: Path, tmp_path: Path
) -> None:
    run = RUN.with_overrides(["model.vision.num_packing_positions=6"])
    origins = warm_start(qwen, siglip, tmp_path / "native", run, Options())
    native_to_hf(tmp_path / "native", tmp_path / "hf", Options(), layout="per-expert")
    got, decoder, vision = map(open_folder, (tmp_path / "hf", qwen, siglip))
    assert got.keys() == origins.keys()
    for name, origin in origins.items():
        part, tensor = part_of(name), got[name].read()
        is_fresh = part in ("projector", "indexer") or "packing" in name
        assert (origin == "fresh") == is_fresh, name
        if not is_fresh:
            source = decoder[name] if part == "decoder" else vision[name.removeprefix("visual.")]
            assert torch.equal(tensor, source.read()), name
            assert origin == str(source.file)
    assert json.loads((tmp_path / "native" / ORIGINS).read_text()) == origins
    assert got["mlp_AR.pre_norm.weight"].read().eq(1).all()
    assert got["mlp_AR.pre_norm.bias"].read().eq(0).all()
    assert 0.01 < float(got["mlp_AR.linear_1.weight"].read().float().std()) < 0.5


def test_without_a_vision_folder_the_vit_is_initialized(qwen: Path, tmp_path: Path) -> None:
    origins = warm_start(qwen, None, tmp_path / "native", RUN, Options())
    fresh = {part_of(name) for name, origin in origins.items() if origin == "fresh"}
    assert fresh == {"vision", "projector", "indexer"}
    assert not (tmp_path / "native.partial").exists()


def test_the_converted_config_is_a_keye_model(qwen: Path, tmp_path: Path) -> None:
    warm_start(qwen, None, tmp_path / "native", RUN, Options())
    native_to_hf(tmp_path / "native", tmp_path / "hf", Options())
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["model_type"] == "KeyeVL2" and config["vision_config"]["hidden_size"] == 16


def test_fresh_tensors_depend_on_name_and_seed_alone(
    qwen: Path, siglip: Path, tmp_path: Path
) -> None:
    warm_start(qwen, None, tmp_path / "a", RUN, Options())
    warm_start(qwen, siglip, tmp_path / "b", RUN, Options())
    other = RUN.with_overrides(["training.seed=5"])
    warm_start(qwen, None, tmp_path / "c", other, Options())
    drawn = []
    for name in "abc":
        native_to_hf(tmp_path / name, tmp_path / f"hf-{name}", Options())
        drawn.append(open_folder(tmp_path / f"hf-{name}")["mlp_AR.linear_1.weight"].read())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_folders_of_different_types_need_a_choice(qwen: Path, tmp_path: Path) -> None:
    seen = {name: shape for name, shape in SHAPES.items() if part_of(name) == "vision"}
    write_noise(tmp_path / "keye15", seen, dtype=torch.float32, file_bytes=10_000)
    write_vision_config(tmp_path / "keye15", num_attention_heads=2)
    with pytest.raises(ValueError, match=r"got type F32 .*expected BF16 .*--dtype"):
        warm_start(qwen, tmp_path / "keye15", tmp_path / "native", RUN, Options())
    warm_start(qwen, tmp_path / "keye15", tmp_path / "native", RUN, Options(dtype=DTYPE))


def test_a_folder_without_a_vit_is_refused(qwen: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got no tensor below .*--vision"):
        warm_start(qwen, qwen, tmp_path / "native", RUN, Options())
    assert {path.name for path in tmp_path.iterdir()} == {"qwen"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_topk_prob": False}, "got norm_topk_prob = False, expected True"),
        ({"norm_topk_prob": None}, "got no norm_topk_prob, which means False"),
        ({"num_experts_per_tok": None}, "got no num_experts_per_tok, which means 8, expected 2"),
        ({"rope_parameters": {"rope_theta": 1e6}}, "got rope_theta = 1000000.0, expected 10000.0"),
        ({"model_type": "KeyeVL2"}, "this is a Keye-VL-2.0 model; convert it with hf-to-native"),
    ],
    ids=str,
)
def test_a_text_model_that_computes_otherwise_is_refused(
    change: dict[str, object], message: str, qwen: Path, tmp_path: Path
) -> None:
    config = json.loads((qwen / "config.json").read_text()) | change
    (qwen / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        warm_start(qwen, None, tmp_path / "native", RUN, Options())


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({}, "got no vision_config.num_attention_heads, which means 12, expected 2"),
        ({"num_attention_heads": 2, "layer_norm_eps": 1e-5}, "layer_norm_eps = 1e-05, expected"),
        ({"num_attention_heads": 2, "hidden_act": "gelu"}, "hidden_act = gelu, expected gelu_py"),
    ],
    ids=str,
)
def test_a_vision_encoder_that_computes_otherwise_is_refused(
    vision: dict[str, object], message: str, qwen: Path, siglip: Path, tmp_path: Path
) -> None:
    write_vision_config(siglip, **vision)
    with pytest.raises(UserError, match=message):
        warm_start(qwen, siglip, tmp_path / "native", RUN, Options())
    (siglip / "config.json").write_text(json.dumps({"model_type": "siglip_vision_model"} | vision))
    with pytest.raises(UserError, match=message):
        warm_start(qwen, siglip, tmp_path / "native", RUN, Options())
