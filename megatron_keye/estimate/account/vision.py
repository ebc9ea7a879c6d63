# SPDX-License-Identifier: Apache-2.0
"""Work of the ViT and the projector over pictures, on one vision rank or on all together."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_keye.config.run import RunConfig
from megatron_keye.estimate.account.linears import (
    Linear,
    Rows,
    adapter_rank,
    linear_work,
    with_adapter,
)
from megatron_keye.estimate.account.work import Passes, Work
from megatron_keye.estimate.state import BYTES
from megatron_keye.plan.cost import Lengths
from megatron_keye.plan.slots import vision_learns


@dataclass(frozen=True, kw_only=True)
class PatchCounts:
    """What vision's work is proportional to."""

    num_patches: float
    """Patches of all pictures."""
    pairs: float
    """Pairs of patches of one picture, which attention weighs in both directions."""
    num_chunks: float
    """Chunks; each is a pass of its own, which reads the weights once."""

    def __mul__(self, factor: float) -> "PatchCounts":
        """Return a rank's share."""
        return PatchCounts(
            num_patches=self.num_patches * factor,
            pairs=self.pairs * factor,
            num_chunks=self.num_chunks * factor,
        )


def count_patches(patches: Lengths, run: RunConfig, num_chunks: int = 0) -> PatchCounts:
    """Return the counts of pictures.

    Args:
        patches: Patches of each.
        run: Most patches of a chunk.
        num_chunks: Chunks that they are encoded in; 0 for as few as there may be.
    """
    sizes = np.asarray(patches, dtype=np.int64)
    total = int(sizes.sum())
    return PatchCounts(
        num_patches=total,
        pairs=float(sizes @ sizes),
        num_chunks=num_chunks or -(-total // run.parallel.vision.chunk_patches),
    )


def vision_works(run: RunConfig, counts: PatchCounts) -> list[Work]:
    """Return the works of ViT and projector; with a feature cache, of the projector alone.

    Args:
        run: Sizes, recomputation and what learns. `parallel.vision.recompute` "auto" counts as
            "on": how much room there is shows when it runs.
        counts: Of pictures.
    """
    encodes_again = vision_learns(run) and run.parallel.vision.recompute != "off"
    works = [_projector(run, counts, int(encodes_again))]
    if not run.data.feature_cache:
        repeats = int(encodes_again)
        works = [
            _linears(run, counts, repeats),
            _attention(run, counts, repeats),
            _norms(run, counts, repeats),
            *works,
        ]
    return works


def _linears(run: RunConfig, counts: PatchCounts, num_repeats: int) -> Work:
    """Embedding of patches, whose pixels have no gradient, and four and two linears a layer.

    Where adapters learn and nothing before them, the input of the first layer has none either.
    """
    vision, training = run.model.vision, run.training
    width, inner = vision.hidden_size, vision.intermediate_size
    learns = training.is_trained("vision", is_adapter=False)
    passes = "vision" in training.trained_parts
    rank = adapter_rank(run, "vision")

    def linear(inputs: float, outputs: float, *, is_first: bool = False) -> list[Linear]:
        reaches = learns if is_first else passes
        own = Linear(inputs=inputs, outputs=outputs, learns=learns, passes_gradients=reaches)
        return with_adapter(own, rank)

    pixels = 3 * vision.patch_size**2
    embedding = Linear(inputs=pixels, outputs=width, learns=learns, passes_gradients=False)
    first = linear(width, 3 * width, is_first=True)
    others = linear(width, 3 * width)
    if rank:
        # Each of the three has matrices of its own.
        first, others = (3 * linear(width, width, is_first=i) for i in (True, False))
    rest = [*linear(width, width), *linear(width, inner), *linear(inner, width)]
    stack = [embedding, *first, *others * (vision.num_layers - 1), *rest * vision.num_layers]
    return linear_work("vision.linear", stack, _rows(counts), run, num_repeats=num_repeats)


def _rows(counts: PatchCounts, num_merged: int = 1) -> Rows:
    rows = counts.num_patches / num_merged
    return Rows(real=rows, laid=rows, num_passes=counts.num_chunks)


def _attention(run: RunConfig, counts: PatchCounts, num_repeats: int) -> Work:
    """Attend: two products a pair, four in the backward pass, which first repeats one."""
    vision, size = run.model.vision, BYTES[run.training.precision]
    of_pair = 4.0 * vision.num_layers * vision.hidden_size
    has_backward = "vision" in run.training.trained_parts
    once = Passes(forward=of_pair, backward=2 * of_pair * has_backward)
    again = of_pair * (num_repeats + 0.5 * has_backward)
    numbers = size * vision.num_layers * vision.hidden_size * counts.num_patches
    return Work(
        module="vision.attention",
        precision=run.training.precision,
        model_flops=once * counts.pairs,
        executed_flops=(once + Passes(recomputed=again)) * counts.pairs,
        # Queries, keys, values and output; and the gradient of each.
        moved_bytes=Passes(
            forward=4 * numbers,
            backward=8 * numbers * has_backward,
            recomputed=4 * num_repeats * numbers,
        ),
    )


def _norms(run: RunConfig, counts: PatchCounts, num_repeats: int) -> Work:
    """Two norms a layer with the sums before them, as the decoder's, and the last one."""
    vision = run.model.vision
    numbers = BYTES[run.training.precision] * vision.hidden_size * counts.num_patches
    forward = (2 * 4 * vision.num_layers + 2) * numbers
    backward = (2 * 4 * vision.num_layers + 3) * numbers
    has_backward = "vision" in run.training.trained_parts
    return Work(
        module="vision.norms",
        precision=run.training.precision,
        moved_bytes=Passes(
            forward=forward, backward=backward * has_backward, recomputed=num_repeats * forward
        ),
    )


def _projector(run: RunConfig, counts: PatchCounts, num_repeats: int) -> Work:
    """Two linears for each token, which is several patches.

    Gradients pass the second where something at or before the first learns, and the first where
    its norm or the ViT does.
    """
    vision, training = run.model.vision, run.training
    merged = vision.hidden_size * vision.merge_size**2
    learns = training.is_trained("projector", is_adapter=False)
    vision_has = "vision" in training.trained_parts
    rank = adapter_rank(run, "projector")
    build: dict[str, Any] = {"learns": learns}
    first = Linear(inputs=merged, outputs=merged, passes_gradients=vision_has or learns, **build)
    second = Linear(
        inputs=merged,
        outputs=run.model.decoder.hidden_size,
        passes_gradients=vision_has or "projector" in training.trained_parts,
        **build,
    )
    linears = [*with_adapter(first, rank), *with_adapter(second, rank)]
    rows = _rows(counts, vision.merge_size**2)
    return linear_work("projector", linears, rows, run, num_repeats=num_repeats)
