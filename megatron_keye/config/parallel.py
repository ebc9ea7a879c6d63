"""How many ranks share the work, along which axes, for the decoder and for vision."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_keye.config.check import check

Placement = Literal["dedicated", "colocated"]


@dataclass(frozen=True, kw_only=True)
class DecoderParallel:
    """Degrees of the decoder grid; their product is its number of ranks."""

    tensor: int = 1
    """Ranks that share each matrix; above 1 the sequence is split over them too."""
    pipeline: int = 1
    """Stages that the layers are cut into."""
    virtual_stages: int = 1
    """Virtual stages per stage (Megatron's model chunks); above 1 the pipeline is interleaved."""
    first_stage_layers: int = 0
    """Decoder layers of the first stage, which embeds too; 0 for as many as other stages have."""
    last_stage_layers: int = 0
    """Decoder layers of the last stage, which has the output layer too; 0 likewise for as many as
    other stages have."""
    context: int = 1
    """Ranks that share each row's tokens."""
    expert: int = 1
    """Ranks that share the experts; divides tensor x context x data."""
    data: int = 1
    """Replicas that take different rows."""

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "virtual_stages", "context", "expert", "data"):
            degree = getattr(self, name)
            check(degree > 0, f"parallel.decoder.{name}", degree, "1 or more")
        sharers = self.tensor * self.context * self.data
        check(
            sharers % self.expert == 0,
            "parallel.decoder.expert",
            self.expert,
            f"a divisor of tensor x context x data = {sharers}",
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
                layers == 0 or (layers > 0 and self.pipeline > 1),
                f"parallel.decoder.{name}",
                layers,
                "0, or 1 and more where parallel.decoder.pipeline is above 1",
            )

    def layers_per_stage(self, num_layers: int) -> list[int]:
        """Return how many of `num_layers` decoder layers each stage holds.

        Raises:
            UserError: When the layers cannot be dealt out so, naming the field to change.
        """
        given = {0: self.first_stage_layers, self.pipeline - 1: self.last_stage_layers}
        given = {stage: layers for stage, layers in given.items() if layers}
        others = self.pipeline - len(given)
        rest = num_layers - sum(given.values())
        share, left = divmod(rest, others) if others else (0, rest)
        check(
            left == 0 and (share > 0 or not others),
            "model.decoder.num_layers",
            num_layers,
            f"a multiple of parallel.decoder.pipeline = {self.pipeline}"
            if not given
            else f"{sum(given.values())} for the stages that parallel.decoder.first_stage_layers "
            f"and last_stage_layers set, plus a multiple of the {others} others",
        )
        layers = [given.get(stage, share) for stage in range(self.pipeline)]
        check(
            all(count % self.virtual_stages == 0 for count in layers),
            "parallel.decoder.virtual_stages",
            self.virtual_stages,
            f"a divisor of each stage's layers, {layers}",
        )
        return layers

    def virtual_stage_layers(self, num_layers: int, stage: int, index: int) -> range:
        """Return the layers of one virtual stage: with several of each, stages take turns.

        Args:
            num_layers: Layers of the whole decoder.
            stage: 0-based pipeline stage.
            index: 0-based virtual stage of that stage.
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
    """Where the ViT runs and how its work is cut."""

    placement: Placement = "colocated"
    """"dedicated": on ranks of its own, after the decoder's. "colocated": on the decoder's ranks,
    chunks spread over all of them."""
    num_ranks: int = 0
    """Dedicated vision ranks, any number; 0 when colocated."""
    chunk_patches: int = 8_192
    """Most patches that are encoded at once; bounds memory whatever the video's length. A single
    frame above it makes a chunk of its own."""
    attention_break_even_patches: int = 0
    """Patches of a frame whose attention takes as long as the rest of the ViT, for balancing the
    work; megatron-keye profile --fit-vision measures it. 0: counted from the model's sizes."""
    max_ahead_mebibytes: int = 1024
    """Most memory, in MiB, for features of the next step that a dedicated vision rank encodes
    ahead, which it does where ViT and projector are frozen; 0: it does not work ahead."""

    def __post_init__(self) -> None:
        check(
            self.placement in ("dedicated", "colocated"),
            "parallel.vision.placement",
            self.placement,
            "'dedicated' or 'colocated'",
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
            self.chunk_patches > 0,
            "parallel.vision.chunk_patches",
            self.chunk_patches,
            "1 or more",
        )
        check(
            self.attention_break_even_patches >= 0,
            "parallel.vision.attention_break_even_patches",
            self.attention_break_even_patches,
            "0 or more",
        )
        check(
            self.max_ahead_mebibytes >= 0,
            "parallel.vision.max_ahead_mebibytes",
            self.max_ahead_mebibytes,
            "0 or more",
        )


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Both grids. Decoder ranks come first, dedicated vision ranks after them."""

    decoder: DecoderParallel = field(default_factory=DecoderParallel)
    """Grid of the language model."""
    vision: VisionParallel = field(default_factory=VisionParallel)
    """Grid of the ViT."""

    @property
    def num_ranks(self) -> int:
        """Ranks of the whole job."""
        return self.decoder.num_ranks + self.vision.num_ranks

    def describe(self) -> str:
        """Return the degrees and what they multiply to, for error messages and logs."""
        d, v = self.decoder, self.vision
        encoders = f"{v.num_ranks} vision ranks" if v.num_ranks else "vision colocated"
        return (
            f"tensor {d.tensor} x pipeline {d.pipeline} x context {d.context} x data {d.data} "
            f"(expert {d.expert}) + {encoders} = {self.num_ranks} ranks"
        )
