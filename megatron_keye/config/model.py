# SPDX-License-Identifier: Apache-2.0
"""Sizes of the model: vision encoder, projector, decoder, experts and indexer.

Standard library only, so that planning needs no torch. Names follow the released checkpoint's
configuration where it has one.
"""

from dataclasses import dataclass, field, fields

from megatron_keye.config.check import check, check_numbers


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Native-resolution ViT (SigLIP so400m family) and the projector that merges its patches."""

    num_layers: int
    """Encoder layers; 27 in the released model."""
    hidden_size: int
    """Hidden size W of the encoder; a multiple of 4 x num_heads."""
    intermediate_size: int
    """Hidden size of the encoder's MLP."""
    num_heads: int
    """Attention heads."""
    patch_size: int = 14
    """Side of one square patch, in pixels."""
    image_size: int = 384
    """Image side, in pixels, of the learned position embeddings; the table has
    (image_size // patch_size)^2 rows and is interpolated to the size of each image or frame."""
    merge_size: int = 2
    """The projector merges merge_size x merge_size patches into one decoder token."""
    layer_norm_eps: float = 1e-6
    """Epsilon of the encoder's LayerNorms; the projector's is fixed at 1e-5."""
    rope_theta: float = 10_000.0
    """Base of the 2-D rotary frequencies."""
    num_packing_positions: int = 0
    """Rows of the released checkpoint's second position table (32,768), which is converted but
    never used; 0 for none."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            "model.vision",
            above_zero="num_layers hidden_size intermediate_size num_heads patch_size image_size "
            "merge_size layer_norm_eps rope_theta",
            zero_or_more="num_packing_positions",
        )
        check(
            self.hidden_size % (4 * self.num_heads) == 0,
            "model.vision.hidden_size",
            self.hidden_size,
            f"a multiple of 4 x num_heads = {4 * self.num_heads}, for row and column rotary",
        )
        check(
            self.image_size >= self.patch_size,
            "model.vision.image_size",
            self.image_size,
            f"at least patch_size = {self.patch_size}",
        )

    @property
    def token_side_pixels(self) -> int:
        """Side in pixels of the square that becomes one decoder token (28 in the release)."""
        return self.patch_size * self.merge_size


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """Mixture of experts in every decoder layer; softmax router, top-k, renormalised."""

    num_experts: int
    """Experts per layer."""
    num_experts_per_token: int
    """Experts per token (top-k of the router)."""
    intermediate_size: int
    """Hidden size F of one gated expert."""
    balance_loss_weight: float = 1e-3
    """Weight of the router's load-balancing loss (Switch Transformer, per row); 0: none."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            "model.decoder.experts",
            above_zero="num_experts num_experts_per_token intermediate_size",
            zero_or_more="balance_loss_weight",
        )
        check(
            self.num_experts_per_token <= self.num_experts,
            "model.decoder.experts.num_experts_per_token",
            self.num_experts_per_token,
            f"at most num_experts = {self.num_experts}",
        )


@dataclass(frozen=True, kw_only=True)
class IndexerConfig:
    """Lightning indexer, which scores all keys and selects the top-k of each query."""

    num_heads: int
    """Indexer query heads I; they share one key head."""
    head_dim: int
    """Channels J of one indexer head; a multiple of 4, with "fp8" a power of two."""
    top_k: int
    """Keys K that each query attends to; all visible keys if there are fewer."""
    quantization: str = "none"
    """"fp8" multiplies queries and keys by a Hadamard matrix and rounds each to e4m3 with a
    power-of-two scale, as in serving of the released model; gradients pass straight through the
    rounding. Rows above 16384 keys are then selected from by e4m3 products on Hopper. "none"
    computes in the precision of training."""

    def __post_init__(self) -> None:
        check_numbers(self, "model.decoder.indexer", above_zero="num_heads head_dim top_k")
        check(
            self.head_dim % 4 == 0,
            "model.decoder.indexer.head_dim",
            self.head_dim,
            "a positive multiple of 4",
        )
        check(
            self.quantization in ("none", "fp8"),
            "model.decoder.indexer.quantization",
            self.quantization,
            "none or fp8",
        )
        check(
            self.quantization == "none" or self.head_dim & (self.head_dim - 1) == 0,
            "model.decoder.indexer.head_dim",
            self.head_dim,
            "a power of two with quantization = fp8",
        )


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Qwen3-MoE decoder with grouped-query attention to the keys that an indexer selects."""

    num_layers: int
    """Decoder layers, each with experts and an indexer; 48 in the released model."""
    hidden_size: int
    """Hidden size D."""
    num_heads: int
    """Query heads H."""
    num_kv_heads: int
    """Key-value heads G; divides num_heads."""
    head_dim: int
    """Channels C of one head; need not be hidden_size / num_heads."""
    vocab_size: int
    """Vocabulary size of the embedding and of the output layer, which are not tied."""
    experts: ExpertsConfig
    """Experts of every layer."""
    indexer: IndexerConfig
    """Indexer of every layer."""
    rope_theta: float = 10_000_000.0
    """Base of the rotary frequencies of attention and indexer."""
    rope_sections: tuple[int, int, int] = (16, 24, 24)
    """Rotary frequencies for time, height and width (M-RoPE); they sum to head_dim / 2."""
    rms_norm_eps: float = 1e-6
    """Epsilon of all RMSNorms but the indexer's, which is fixed at 1e-6."""
    init_std: float = 0.02
    """Standard deviation of initial linear and embedding weights."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            "model.decoder",
            above_zero="num_layers hidden_size num_heads num_kv_heads head_dim vocab_size "
            "rope_theta rms_norm_eps init_std",
        )
        check(
            self.num_heads % self.num_kv_heads == 0,
            "model.decoder.num_heads",
            self.num_heads,
            f"a multiple of num_kv_heads = {self.num_kv_heads}",
        )
        sections = self.rope_sections
        check(
            2 * sum(sections) == self.head_dim and min(sections) >= 0,
            "model.decoder.rope_sections",
            sections,
            f"three numbers of 0 or more whose sum is head_dim / 2 = {self.head_dim / 2:g}",
        )
        scaled = [
            section * self.indexer.head_dim % self.head_dim for section in self.rope_sections
        ]
        check(
            not any(scaled),
            "model.decoder.indexer.head_dim",
            self.indexer.head_dim,
            f"a size for which rope_sections {self.rope_sections} of head_dim {self.head_dim} "
            "scale to integers",
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The whole model, and the token ids that mark images and frames in the text."""

    vision: VisionConfig
    """ViT and projector."""
    decoder: DecoderConfig
    """Language model."""
    image_token_id: int = 151_655
    """Placeholder in the text for one vision token of an image."""
    video_token_id: int = 151_656
    """Placeholder in the text for one vision token of a video frame."""
    vision_start_token_id: int = 151_652
    """Token before the placeholders of one image or frame."""
    vision_end_token_id: int = 151_653
    """Token after the placeholders of one image or frame."""

    vision_token_ids: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "vision_token_ids", (self.image_token_id, self.video_token_id))
        names = [field.name for field in fields(self) if field.name.endswith("_token_id")]
        check_numbers(self, "model", zero_or_more=" ".join(names))
        ids = [getattr(self, name) for name in names]
        for name, token_id in zip(names, ids, strict=True):
            check(
                token_id < self.decoder.vocab_size,
                f"model.{name}",
                token_id,
                f"an id below model.decoder.vocab_size = {self.decoder.vocab_size}",
            )
            check(
                ids.count(token_id) == 1,
                f"model.{name}",
                token_id,
                f"an id of its own, but {', '.join(names)} are {ids}",
            )
