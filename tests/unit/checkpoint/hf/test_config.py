# SPDX-License-Identifier: Apache-2.0
"""config.json converts both ways under the released names, and another model is refused."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_keye.checkpoint.hf.config import (
    check_config,
    get,
    model_from_config,
    put,
    read_config,
    unread_fields,
)
from megatron_keye.checkpoint.hf.config_fields import FIELDS, KEYE
from megatron_keye.checkpoint.hf.write_config import changes_of_config, make_config
from megatron_keye.config import ExpertsConfig, IndexerConfig, VisionConfig
from megatron_keye.errors import UserError
from tests.support.tiny import tiny_model, tiny_run

MODEL = tiny_model()
ROPE = {"rope_type": "default", "rope_theta": 10_000, "mrope_section": [2, 2, 4]}


def written(folder: Path, changes: dict[str, Any] | None = None) -> Path:
    """Write the model's config.json with fields changed by dotted name; ... removes one."""
    config = make_config(MODEL, "bfloat16", {})
    for name, value in (changes or {}).items():
        section, _, field = name.rpartition(".")
        put(config, name, value)
        if value is ...:
            del (get(config, section) if section else config)[field]
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


def test_what_is_written_describes_the_same_model(tmp_path: Path) -> None:
    check_config(written(tmp_path), MODEL)


def test_released_field_names_are_used() -> None:
    config = make_config(MODEL, "bfloat16", {})
    assert config["model_type"] == "KeyeVL2"
    assert config["num_experts_per_tok"] == 2
    assert config["sa_config"]["topk"] == 12
    assert config["sa_config"]["indexer_num_kv_heads"] == 1
    assert config["vision_config"]["spatial_merge_size"] == 2
    assert config["rope_scaling"] == {"rope_type": "default", "mrope_section": [2, 2, 4]}
    assert config["dtype"] == "bfloat16"


def test_further_fields_of_a_given_config_are_kept() -> None:
    base = {"auto_map": {"AutoConfig": "x"}, "torch_dtype": "float32", "rope_scaling": None}
    config = make_config(MODEL, "bfloat16", base)
    assert config["auto_map"] == base["auto_map"]
    assert config["torch_dtype"] == "bfloat16" and "dtype" not in config
    assert base["rope_scaling"] is None, "the given config is changed"


def test_a_given_config_keeps_its_spelling_and_gets_the_released_one() -> None:
    base = {
        "rope_parameters": {"rope_theta": 5.0, "type": "mrope", "mrope_interleaved": None},
        "text_config": {"hidden_size": 7, "dtype": "float32"},
        "layer_types": ["full_attention"] * 3,
        "quantization_config": {"quant_method": "fp8"},
    }
    config = make_config(MODEL, "bfloat16", base)
    assert config["rope_parameters"]["rope_theta"] == config["rope_theta"] == 10_000.0
    assert config["rope_parameters"]["type"] == "mrope", "a synonym stays"
    assert config["text_config"]["hidden_size"] == config["hidden_size"] == 32
    assert config["text_config"]["dtype"] == config["dtype"] == "bfloat16"
    assert "use_sliding_window" not in config and "quantization_config" not in config


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": ..., "rope_parameters.rope_theta": 10_000},
        {"rope_scaling": ..., "rope_parameters": ROPE},
        {"rope_theta": ..., "rope_scaling": ..., "text_config.rope_parameters": ROPE},
        {"rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 4]}},
        {"rope_scaling.type": "default"},
        {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 2},
        {"sliding_window": None, "mlp_only_layers": None, "partial_rotary_factor": 1},
        {"layer_types": ["full_attention"] * 4},
        {"num_experts": ..., "num_local_experts": 4},
        {"norm_topk_prob": ..., "vision_config.hidden_act": ..., "hidden_act": ...},
        {"attention_dropout": 0.0, "vision_config.attention_dropout": 0.0, "dtype": ...},
    ],
    ids=str,
)
def test_other_spellings_of_the_same_model_are_read(
    change: dict[str, Any], tmp_path: Path
) -> None:
    path = written(tmp_path, change)
    check_config(path, MODEL)
    assert list(unread_fields(read_config(path), KEYE)) == []
    assert changes_of_config(MODEL, read_config(path), path) == []
    if "num_experts" not in change:
        assert model_from_config(path, num_packing_positions=0).decoder.rope_theta == 10_000


def test_text_fields_may_all_stand_in_text_config(tmp_path: Path) -> None:
    config = make_config(MODEL, "bfloat16", {})
    outside = ("model_type", "vision_config", "image_token_id", "architectures")
    text = {name: config.pop(name) for name in list(config) if name not in outside}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config | {"text_config": text}))
    check_config(path, MODEL)
    decoder = replace(MODEL.decoder, init_std=0.02)
    experts = replace(decoder.experts, balance_loss_weight=1e-3)
    expected = replace(MODEL, decoder=replace(decoder, experts=experts))
    assert model_from_config(path, num_packing_positions=0) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hidden_size": 64},
            r"got hidden_size = 64, expected 32 .*--set model.decoder.hidden_si",
        ),
        ({"sa_config.topk": 7}, r"sa_config.topk = 7.*--set model.decoder.indexer.top_k=7"),
        ({"rope_scaling.mrope_section": [4, 2, 2]}, r"rope_sections=4,2,2"),
        ({"rope_theta": 1e6}, "got rope_theta = 1000000.0, expected 10000.0"),
        (
            {"rope_theta": ..., "rope_parameters": ROPE | {"rope_theta": 1e6}},
            "got rope_theta = 1000000.0, expected 10000.0.*--set model.decoder.rope_theta=1000000",
        ),
        (
            {"rope_parameters.rope_theta": 1e6},
            "got rope_theta = 10000.0 and rope_parameters.rope_theta = 1000000.0, expected one",
        ),
        (
            {"text_config.rope_theta": 1e6},
            "got rope_theta = 10000.0 and text_config.rope_theta = 1000000.0, expected one",
        ),
        ({"text_config.hidden_size": 64}, "text_config.hidden_size = 64, expected one value"),
        ({"rope_scaling.rope_type": "yarn"}, "rope_type = yarn, expected default"),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, "rope_type = linear, expected"),
        ({"rope_parameters.rope_type": "llama3"}, "rope_parameters.rope_type = 'llama3'"),
        ({"text_config.rope_parameters.rope_type": "yarn"}, "rope_type = 'yarn', expected one"),
        ({"rope_scaling.factor": 4.0}, "got rope_scaling.factor = 4.0, expected no such field"),
        ({"rope_parameters.full_attention": ROPE}, "full_attention = .*expected no such field"),
        ({"rope_scaling.mrope_interleaved": True}, "mrope_interleaved = True, expected False"),
        ({"rope_scaling.mrope_section": [4, 4]}, "rope_sections=4,4"),
        ({"rope_scaling": "yarn"}, "got rope_scaling = 'yarn', expected an object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5, expected 1.0"),
        ({"rope_scaling.partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5, expected"),
        ({"use_sliding_window": True}, "use_sliding_window = True, expected False"),
        ({"sliding_window": 128}, "sliding_window = 128, expected None"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types = .*sliding"),
        ({"norm_topk_prob": False}, "norm_topk_prob = False, expected True"),
        ({"tie_word_embeddings": True}, "another model"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = gelu, expected silu"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step = 2, expected 1"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\], expected \[\]"),
        ({"sa_config.indexer_num_kv_heads": 2}, "indexer_num_kv_heads = 2"),
        ({"vision_config.hidden_act": "gelu"}, "vision_config.hidden_act = gelu"),
        ({"vision_config.num_channels": 4}, "vision_config.num_channels = 4"),
        ({"vision_config.rope_theta": ..., "vision_config.layer_norm_eps": 1e-5}, "1e-05, expec"),
        ({"image_token_id": ...}, "got no image_token_id, which means 151655, expected 90"),
        ({"model_type": "qwen3"}, "a dense Qwen3 model, without experts"),
        ({"model_type": "qwen3_moe"}, "begin from it with warm-start --qwen"),
        ({"model_type": "qwen3_vl_moe"}, "a Qwen3-VL model, whose vision encoder"),
        ({"model_type": "KeyeVL1_5"}, "an earlier Keye-VL model .*warm-start --vision"),
        ({"model_type": "siglip"}, "warm-start --vision"),
        ({"model_type": "llama"}, "another model"),
        ({"model_type": ...}, "got no model_type, expected 'KeyeVL2'"),
        *(
            ({name: ...}, f"got no field {name}, expected one")
            for name in (
                *("rope_theta", "rms_norm_eps", "num_experts_per_tok", "sa_config.topk"),
                *("rope_scaling.mrope_section", "vision_config.num_attention_heads"),
            )
        ),
    ],
    ids=str,
)
def test_another_model_is_refused_by_field(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as error:
        check_config(written(tmp_path, change), MODEL)
    assert "\n" not in str(error.value)


def test_the_advice_for_another_size_of_everything_works(tmp_path: Path) -> None:
    model = tiny_model(
        num_layers=3,
        hidden_size=48,
        num_heads=6,
        num_kv_heads=2,
        head_dim=24,
        vocab_size=98,
        experts=ExpertsConfig(num_experts=6, num_experts_per_token=3, intermediate_size=20),
        indexer=IndexerConfig(num_heads=2, head_dim=12, top_k=9),
        rope_sections=(4, 2, 6),
        rope_theta=5e6,
        rms_norm_eps=1e-5,
    )
    vision = VisionConfig(
        num_layers=3,
        hidden_size=24,
        intermediate_size=20,
        num_heads=3,
        patch_size=6,
        image_size=18,
        merge_size=3,
        layer_norm_eps=1e-7,
        rope_theta=100.0,
    )
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    model = replace(model, vision=vision, **{name: 80 + n for n, name in enumerate(ids)})
    path = tmp_path / "config.json"
    path.write_text(json.dumps(make_config(model, "bfloat16", {})))
    with pytest.raises(UserError) as error:
        check_config(path, MODEL)
    advised = re.findall(r"--set (\S+)", str(error.value))
    assert len(advised) == len([field for field in FIELDS if field.setting]), "of every field"
    check_config(path, tiny_run().with_overrides(advised).model)


def test_fields_that_are_not_read_are_listed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change = {
        "routed_scaling_factor": 2.5,
        "text_config.logit_scale": 0.1,
        "sa_config.num_sink_tokens": 4,
        "vision_config.rope_parameters": {"rope_type": "axial"},
        "vision_config.tokens_per_second": 2,
        "attention_dropout": 0.1,
        "window": None,
        "eos_token_id": 7,
        "initializer_range": 0.01,
    }
    path = written(tmp_path, change)
    unread = list(change)[:6]
    assert set(unread_fields(read_config(path), KEYE)) == set(unread)
    check_config(path, MODEL)
    (record,) = caplog.records
    assert all(name in record.message for name in unread)


def test_what_a_given_config_says_otherwise_is_told(tmp_path: Path) -> None:
    change = {"rope_theta": 5.0, "sa_config.topk": 9, "quantization_config": {"quant_method": "x"}}
    path = written(tmp_path, change)
    told = changes_of_config(MODEL, read_config(path), path)
    assert [line.split()[0] for line in told] == list(change)
    path = written(tmp_path, {"moe_intermediate_size": 25})
    with pytest.raises(UserError, match="got moe_intermediate_size = 25, expected 24"):
        changes_of_config(MODEL, read_config(path), path)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: got .*expected a JSON file"):
        read_config(tmp_path / "config.json")
