# SPDX-License-Identifier: Apache-2.0
"""Degrees of parallelism of the decoder and of vision."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_keye.config.check import check, check_numbers

Placement = Literal["dedicated", "colocated"]
VisionRecompute = Literal["auto", "on", "off"]

VISION_RECOMPUTE: tuple[VisionRecompute, ...] = ("auto", "on", "off")


@dataclass(frozen=True, kw_only=True)
class DecoderParallel:
    """Degrees of the decoder; it has tensor x pipeline x context x data ranks."""

    tensor: int = 1
    """Tensor-parallel ranks; above 1 with sequence parallelism."""
    pipeline: int = 1
    """Pipeline stages."""
    virtual_stages: int = 1
    """Virtual stages (Megatron's model chunks) per stage; above 1 the pipeline is interleaved."""
    first_stage_layers: int = 0
    """Decoder layers of the first stage, which also embeds tokens; 0: as many as other stages."""
    last_stage_layers: int = 0
    """Decoder layers of the last stage, which also has the output layer; 0: as other stages."""
    context: int = 1
    """Context-parallel ranks, which split the tokens of each row."""
    expert: int = 1
    """Expert-parallel ranks; a divisor of tensor x context x data."""
    data: int = 1
    """Data-parallel replicas."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            "parallel.decoder",
            above_zero="tensor pipeline virtual_stages context expert data",
            zero_or_more="first_stage_layers last_stage_layers",
        )
        stage_ranks = self.tensor * self.context * self.data
        check(
            stage_ranks % self.expert == 0,
            "parallel.decoder.expert",
            self.expert,
            f"a divisor of tensor x context x data = {stage_ranks}",
        )
        check(
            self.virtual_stages == 1 or self.pipeline > 1,
            "parallel.decoder.virtual_stages",
            self.virtual_stages,
            "1 unless parallel.decoder.pipeline is above 1",
        )
        for name in ("first_stage_layers", "last_stage_layers"):
            layers = getattr(self, name)
            check(
                layers == 0 or self.pipeline > 1,
                f"parallel.decoder.{name}",
                layers,
                "0, or 1 and more where parallel.decoder.pipeline is above 1",
            )

    def layers_per_stage(self, num_layers: int) -> list[int]:
        """Return how many of `num_layers` decoder layers each stage has.

        Raises:
            UserError: When the layers cannot be split like that, naming the setting to change.
        """
        fixed = {0: self.first_stage_layers, self.pipeline - 1: self.last_stage_layers}
        fixed = {stage: layers for stage, layers in fixed.items() if layers}
        others = self.pipeline - len(fixed)
        rest = num_layers - sum(fixed.values())
        share, left = divmod(rest, others) if others else (0, rest)
        check(
            left == 0 and (share > 0 or not others),
            "model.decoder.num_layers",
            num_layers,
            f"a multiple of parallel.decoder.pipeline = {self.pipeline}"
            if not fixed
            else f"{sum(fixed.values())} for the stages that parallel.decoder.first_stage_layers "
            f"and last_stage_layers set, plus a multiple of the {others} others",
        )
        layers = [fixed.get(stage, share) for stage in range(self.pipeline)]
        check(
            all(count % self.virtual_stages == 0 for count in layers),
            "parallel.decoder.virtual_stages",
            self.virtual_stages,
            f"a divisor of each stage's layers, {layers}",
        )
        return layers

    def virtual_stage_layers(self, num_layers: int, stage: int, index: int) -> range:
        """Return the layers of one virtual stage; stages take turns, as Megatron interleaves.

        Args:
            num_layers: Layers of the whole decoder.
            stage: 0-based pipeline stage.
            index: 0-based virtual stage within it.
        """
        counts = [layers // self.virtual_stages for layers in self.layers_per_stage(num_layers)]
        first = index * sum(counts) + sum(counts[:stage])
        return range(first, first + counts[stage])

    @property
    def num_ranks(self) -> int:
        """Ranks of the decoder grid."""
        return self.tensor * self.pipeline * self.context * self.data


@dataclass(frozen=True, kw_only=True)
class VisionParallel:
    """Ranks of the ViT, and the division of its work."""

    placement: Placement = "colocated"
    """"dedicated": the ViT runs on separate ranks, numbered after the decoder's. "colocated": it
    runs on all ranks of the decoder."""
    num_ranks: int = 0
    """Dedicated vision ranks, any number; 0 if colocated."""
    shared_micro_batches: int = 0
    """With dedicated vision ranks: so many micro-batches at the start of a step, and as many at
    its end, are encoded by the decoder's ranks before they run the decoder, and go backward there
    after it. They would wait meanwhile: at the start for the first features, at the end while
    vision ranks go backward for what the decoder ran last. A pipeline takes the features of
    pipeline micro-batches at once, which is the number to set. 0: the decoder's ranks hold no
    vision."""
    chunk_patches: int = 8_192
    """Most patches that a rank encodes at once, as one chunk of images and frames; bounds memory
    for videos of any length. A single image or frame with more patches is a chunk by itself."""
    recompute: VisionRecompute = "on"
    """Whether chunks are encoded a second time for their backward pass. "on": no activations of
    the ViT wait for it, so that memory is bounded by one chunk. "off": those of all chunks of a
    step do. "auto": those of as many as the GPU has room for beside all else that megatron-keye
    plan expects, and none on a CPU. Results are the same bit for bit. It is on by default until
    the others are measured."""
    attention_break_even_patches: int = 0
    """Number of patches per frame at which the ViT's attention takes as long as the rest of the
    ViT; the cost model that balances vision ranks uses it. megatron-keye profile --fit-vision
    measures it; 0 derives it from counted operations."""
    max_ahead_mebibytes: int = 1024
    """With frozen ViT and projector, dedicated vision ranks encode the next step while the decoder
    works; this is the most memory for such features, in MiB. 0: they do not work ahead."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            "parallel.vision",
            above_zero="chunk_patches",
            zero_or_more="num_ranks shared_micro_batches attention_break_even_patches "
            "max_ahead_mebibytes",
        )
        check(
            self.placement in ("dedicated", "colocated"),
            "parallel.vision.placement",
            self.placement,
            "'dedicated' or 'colocated'",
        )
        check(
            self.recompute in VISION_RECOMPUTE,
            "parallel.vision.recompute",
            self.recompute,
            f"one of {VISION_RECOMPUTE}",
        )
        if self.placement == "dedicated":
            check(
                self.num_ranks > 0,
                "parallel.vision.num_ranks",
                self.num_ranks,
                "1 or more, since parallel.vision.placement is 'dedicated'",
            )
        else:
            check(
                self.num_ranks == 0,
                "parallel.vision.num_ranks",
                self.num_ranks,
                "0, since parallel.vision.placement is 'colocated' (the decoder's ranks encode)",
            )
            check(
                self.shared_micro_batches == 0,
                "parallel.vision.shared_micro_batches",
                self.shared_micro_batches,
                "0, since parallel.vision.placement is 'colocated' (all are encoded there)",
            )

    @property
    def decoder_encodes(self) -> bool:
        """Whether the decoder's ranks hold vision and encode, all or a part."""
        return self.placement == "colocated" or self.shared_micro_batches > 0


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Ranks of decoder and vision; the decoder's come first, dedicated vision ranks after them."""

    decoder: DecoderParallel = field(default_factory=DecoderParallel)
    """Degrees of the decoder."""
    vision: VisionParallel = field(default_factory=VisionParallel)
    """Ranks of the ViT."""

    @property
    def num_ranks(self) -> int:
        """Ranks of the whole job."""
        return self.decoder.num_ranks + self.vision.num_ranks

    def describe(self) -> str:
        """Return the degrees and the number of ranks, for error messages and logs."""
        d, v = self.decoder, self.vision
        encoders = f"{v.num_ranks} vision ranks" if v.num_ranks else "vision colocated"
        if v.shared_micro_batches:
            encoders += f" (without {v.shared_micro_batches} micro-batches at each end)"
        return (
            f"tensor {d.tensor} x pipeline {d.pipeline} x context {d.context} x data {d.data} "
            f"(expert {d.expert}) + {encoders} = {self.num_ranks} ranks"
        )
