# SPDX-License-Identifier: Apache-2.0
"""The cases of tools/benchmark_step.py: what one of them is, and which make a table."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np

from megatron_keye.config import DecoderParallel, FusionsConfig, ParallelConfig, RunConfig
from megatron_keye.config.run import as_override
from megatron_keye.config.training import Phase, Recompute
from megatron_keye.estimate.account import row_works, total_model_flops
from megatron_keye.plan.prefix_trees import PrefixTrees
from megatron_keye.plan.slots import RowSizes
from megatron_keye.recipes import load_recipe

Layout = Literal["one", "packed", "answers"]
Locality = Literal["segments", "tokens"]

FUSIONS = tuple(each.name for each in fields(FusionsConfig))
PACKED_DOCUMENTS = 8
ANSWERS, ANSWER_SHARE = 8, 40
"""Answers behind one prompt, and how many of them are as long as their row."""
PEER_RECOMPUTES: dict[Recompute, list[str]] = {
    "none": [],
    "experts": ["moe"],
    "selective": ["moe", "layernorm"],
    "full": ["moe", "layernorm"],
}
"""Modules that plain Megatron-Core recomputes beside each of our choices: its usual ones."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement of our layers, and the peer's beside it."""

    tokens: int
    """Length of the row."""
    phase: Phase = "sparse"
    """Of our layers; the peer is always dense."""
    layout: Layout = "one"
    """One document, PACKED_DOCUMENTS of one length, or a prompt with ANSWERS behind it, to be
    compared with ANSWERS rows of "one", each as long as the prompt and an answer."""
    locality: Locality = "segments"
    """Whether hidden states are segments of 64 alike tokens, whose queries select alike, or
    independent of one another."""
    recompute: Recompute = "none"
    """What our layers recompute."""
    keeps_in_host_memory: bool = False
    """Whether what they keep for that waits there."""
    without: str = ""
    """A fusion that is off, "all" of them, or "": all run that can."""

    def document_lengths(self) -> list[int]:
        """Return the lengths of the documents, in order."""
        if self.layout == "one":
            return [self.tokens]
        size, rest = divmod(self.tokens, PACKED_DOCUMENTS)
        return [size + (index < rest) for index in range(PACKED_DOCUMENTS)]

    def branches(self) -> PrefixTrees:
        """Return the branches of the row; a document is one where none branches."""
        if self.layout != "answers":
            return PrefixTrees.of_documents(np.cumsum([0, *self.document_lengths()]))
        answer = self.tokens // ANSWER_SHARE
        prompt = self.tokens - ANSWERS * answer
        bounds = np.cumsum([0, prompt, *[answer] * ANSWERS])
        return PrefixTrees(bounds=bounds, parents=np.array([-1] + [0] * ANSWERS))

    def layer_flops(self, run: RunConfig) -> float:
        """Return the model FLOPs of all layers, forward and backward, over all ranks.

        Args:
            run: From `run`.
        """
        trees = self.branches()
        layer, _ = row_works(run, RowSizes(trees.lengths, [], trees.num_earlier))
        return total_model_flops(layer) * run.model.decoder.num_layers

    def peer(self) -> "Case":
        """Return the case whose peer is also this one's: it does not see the rest."""
        return Case(
            tokens=self.tokens,
            phase="dense",
            layout=self.layout,
            recompute="selective" if self.recompute == "full" else self.recompute,
        )

    def run(
        self, recipe: str, settings: list[str], *, layers: int, has_gpu: bool, ranks: int = 1
    ) -> RunConfig:
        """Return the recipe with a few layers, and what the case changes.

        Several ranks split rows by context and the experts.

        Raises:
            UserError: For an unknown recipe or setting.
        """
        base = load_recipe(recipe)(num_ranks=1, has_gpu=has_gpu)
        off = FUSIONS if self.without == "all" else (self.without,) if self.without else ()
        degrees = DecoderParallel(context=ranks, expert=ranks)
        return replace(base, parallel=ParallelConfig(decoder=degrees)).with_overrides(
            [
                f"model.decoder.num_layers={layers}",
                f"data.row_tokens={self.tokens}",
                f"training.phase={self.phase}",
                f"training.recompute={self.recompute}",
                as_override("training.keeps_in_host_memory", self.keeps_in_host_memory),
                "training.rows_per_step=1",
                *(f"training.fusions.{n}={'off' if n in off else 'auto'}" for n in FUSIONS),
                *settings,
            ]
        )


def compared(line: dict[str, Any], peer: dict[str, Any]) -> dict[str, Any]:
    """Return the ratios of a case to its peer; without the time of either one none."""
    if "error" in line or "error" in peer:
        return {}
    own, other = (each["forward_ms"] + each["backward_ms"] for each in (line, peer))
    return {
        "times_faster": round(other / own, 3),
        "step_times_faster": round(peer["step_ms"] / line["step_ms"], 3),
        "peak_to_peer": round(line["peak_mib"] / max(1, peer["peak_mib"]), 3),
    }


def one_gpu_table() -> Iterator[Case]:
    """Yield the cases of one GPU of 80 GB, for about five minutes."""
    short, middle, long = (Case(tokens=1024 * count) for count in (8, 32, 128))
    yield short
    for name in ("all", *FUSIONS):
        yield replace(short, without=name)
    yield replace(short, phase="dense")
    yield replace(short, phase="indexer_warmup")
    yield replace(short, layout="packed")
    yield middle
    yield replace(middle, without="all")
    yield replace(middle, phase="dense")
    for recompute in ("experts", "selective", "full"):
        yield replace(middle, recompute=recompute)
    yield Case(tokens=65_536, recompute="selective")
    yield replace(long, recompute="selective")
    yield replace(long, recompute="selective", locality="tokens")
    yield replace(long, recompute="selective", without="all")
    yield replace(long, recompute="selective", keeps_in_host_memory=True)
    yield replace(long, recompute="full")
    yield replace(long, recompute="experts")


def two_gpu_table() -> Iterator[Case]:
    """Yield the cases of two GPUs of 80 GB, context 2 x expert 2, for less than three minutes."""
    for count in (128, 256):
        yield Case(tokens=1024 * count, recompute="selective")
    yield Case(tokens=131_072, recompute="selective", phase="indexer_warmup")


def every_combination(
    tokens: list[int],
    phases: list[Phase],
    layouts: list[Layout],
    localities: list[Locality],
    recomputes: list[Recompute],
    without: list[str],
) -> Iterator[Case]:
    """Yield a case for each combination; the arguments are the values of Case's fields."""
    for each in itertools.product(tokens, phases, layouts, localities, recomputes, without):
        yield Case(
            tokens=each[0],
            phase=each[1],
            layout=each[2],
            locality=each[3],
            recompute=each[4],
            without=each[5],
        )
