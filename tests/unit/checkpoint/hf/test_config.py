"""config.json converts both ways under the released names, and another model is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_keye.checkpoint.hf.config import check_config, make_config, read_config
from tests.support.tiny import tiny_model

MODEL = tiny_model()


def written(folder: Path, **changes: Any) -> Path:
    config = make_config(MODEL, "bfloat16", {})
    for name, value in changes.items():
        section, _, field = name.rpartition("__")
        (config[section] if section else config)[field] = value
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hidden_size": 64},
            r"got hidden_size = 64, expected 32 .*--set model.decoder.hidden_si",
        ),
        ({"sa_config__topk": 7}, r"sa_config.topk = 7.*--set model.decoder.indexer.top_k=7"),
        ({"rope_scaling__mrope_section": [4, 2, 2]}, r"rope_sections=4,2,2"),
        ({"tie_word_embeddings": True}, "another model"),
        ({"model_type": "qwen3"}, "another model"),
    ],
)
def test_another_model_is_refused_by_field(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        check_config(written(tmp_path, **change), MODEL)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: got .*expected a JSON file"):
        read_config(tmp_path / "config.json")
