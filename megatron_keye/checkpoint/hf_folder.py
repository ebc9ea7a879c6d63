"""Provisional reader of a Hugging Face folder; gives way to hf_config and safetensors_index."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from megatron_keye.config import (
    DecoderConfig,
    ExpertsConfig,
    IndexerConfig,
    ModelConfig,
    VisionConfig,
)

_PACKING = "visual.vision_model.embeddings.packing_position_embedding.weight"


class HfFolder:
    """Tensors and sizes of one checkpoint."""

    def __init__(self, folder: Path) -> None:
        """Open all shards of `folder`."""
        self.path = folder
        self._files: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = safe_open(path, framework="pt")
            self._files |= dict.fromkeys(file.keys(), file)
        config = json.loads((folder / "config.json").read_text())
        packing = self.shape(_PACKING)[0] if _PACKING in self._files else 0
        self.model = _model(config, packing)

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return sorted(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor without reading it."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        """Read one tensor."""
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor


def _model(config: dict[str, Any], packing: int) -> ModelConfig:
    vision, indexer = config["vision_config"], config["sa_config"]
    return ModelConfig(
        vision=VisionConfig(
            num_layers=vision["num_hidden_layers"],
            hidden_size=vision["hidden_size"],
            intermediate_size=vision["intermediate_size"],
            num_heads=vision["num_attention_heads"],
            patch_size=vision["patch_size"],
            image_size=vision["image_size"],
            merge_size=vision["spatial_merge_size"],
            layer_norm_eps=vision["layer_norm_eps"],
            rope_theta=vision.get("rope_theta", 1e4),
            num_packing_positions=packing,
        ),
        decoder=DecoderConfig(
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            num_heads=config["num_attention_heads"],
            num_kv_heads=config["num_key_value_heads"],
            head_dim=config["head_dim"],
            vocab_size=config["vocab_size"],
            experts=ExpertsConfig(
                num_experts=config["num_experts"],
                num_experts_per_token=config["num_experts_per_tok"],
                intermediate_size=config["moe_intermediate_size"],
            ),
            indexer=IndexerConfig(
                num_heads=indexer["indexer_num_heads"],
                head_dim=indexer["indexer_head_dim"],
                top_k=indexer["topk"],
            ),
            rope_theta=config["rope_theta"],
            rope_sections=tuple(config["rope_scaling"]["mrope_section"]),
            rms_norm_eps=config["rms_norm_eps"],
        ),
        image_token_id=config["image_token_id"],
        video_token_id=config["video_token_id"],
        vision_start_token_id=config["vision_start_token_id"],
        vision_end_token_id=config["vision_end_token_id"],
    )
