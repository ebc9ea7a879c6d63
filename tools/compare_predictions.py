# SPDX-License-Identifier: Apache-2.0
"""Compares predicted times and memory with measured runs, as the tables of docs/plan.md.

    python -m tools.compare_predictions [--write]

The runs stand in docs/benchmarks/steps_measured.jsonl: medians of two full-width layers, forward
and backward, as tools/benchmark_step.py times them, and whole steps of keye_two_gpus.
"""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_keye.cli.arguments import make_parser
from megatron_keye.config import DecoderParallel, ParallelConfig, RunConfig, VisionParallel
from megatron_keye.estimate.layouts.choices import needed_bytes
from megatron_keye.estimate.memory import decoder_memory
from megatron_keye.estimate.parameters import decoder_parameters
from megatron_keye.estimate.prediction.layer import Seconds, layer_seconds
from megatron_keye.estimate.prediction.machines import MACHINES
from megatron_keye.estimate.prediction.mix import RowMix
from megatron_keye.estimate.prediction.step import Predictor
from megatron_keye.plan.slots import RowSizes
from megatron_keye.recipes import load_recipe

_DOCS = Path(__file__).parents[1] / "docs"
MEASURED = _DOCS / "benchmarks/steps_measured.jsonl"
PAGE = _DOCS / "plan.md"


@dataclass(frozen=True)
class Comparison:
    """One number of one run, measured and predicted."""

    run: str
    """What was measured, and on what."""
    commit: str
    """Of the code that was measured."""
    measured: float
    """Milliseconds, or MiB."""
    predicted: float
    """The same."""
    calibrates: bool = False
    """Whether a constant was fitted to this run."""
    shaped: bool = False
    """Whether a formula was changed after this run had been compared with it."""

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted / self.measured - 1


def main(arguments: Sequence[str]) -> int:
    """Print both tables, or put them into the page."""
    parser = make_parser("python -m tools.compare_predictions", __doc__)
    parser.add_argument("--write", action="store_true", help="renew them in docs/plan.md")
    if parser.parse_args(arguments).write:
        PAGE.write_text(renewed(PAGE.read_text()))
    else:
        sys.stdout.write(tables())
    return 0


def renewed(page: str) -> str:
    """Return the page with today's tables in the places of those that it has."""
    for table in tables().strip().split("\n\n"):
        head = table.partition("\n")[0]
        former = re.search(re.escape(head) + r"\n(\|.*(\n|$))+", page)
        assert former is not None, f"{PAGE} has no table with the head {head!r}"
        page = page.replace(former[0], f"{table.strip()}\n")
    return page


def tables() -> str:
    """Return both tables in Markdown."""
    times, memory = compare_times(), compare_memory()
    return _table("measured, ms", times) + "\n" + _table("measured, MiB", memory)


def compare_times() -> list[Comparison]:
    """Return the times of all runs that have one."""
    return [
        replace(
            _comparison(line, line["measured_ms"], 1e3 * predicted_seconds(line)),
            calibrates=line["calibrates"],
            shaped=line.get("shaped", False),
        )
        for line in _lines()
        if "measured_ms" in line
    ]


def compare_memory() -> list[Comparison]:
    """Return the memory of all runs that have it; no constant is fitted to any."""
    return [
        _comparison(line, line["measured_mib"], predicted_bytes(line) / 2**20)
        for line in _lines()
        if "measured_mib" in line
    ]


def predicted_seconds(line: dict[str, Any]) -> float:
    """Return the predicted time of a run: of a step, or of layers."""
    run, machine = run_of(line), MACHINES[line["gpu"]]
    if "layers" not in line:
        mix = RowMix([row_of(line, run)] * run.training.rows_per_step, run, frames_per_picture=1)
        return Predictor(mix, machine).predict(run).seconds
    mix = RowMix([RowSizes([line["tokens"]], [])], run, line["union_keys"])
    parts = layer_seconds(run, mix, machine).values()
    return sum(parts, Seconds()).total * int(line["layers"])


def predicted_bytes(line: dict[str, Any]) -> float:
    """Return the predicted memory of the fullest GPU.

    Earlier commits kept the indexer's target, four float32 a selected key, from the forward pass:
    of each layer, or with "selective" and "full" of the one that is computed again.
    """
    run = run_of(line)
    decoder = run.model.decoder
    target = run.data.row_tokens // run.parallel.decoder.context * decoder.indexer.top_k
    target *= 4 * decoder.num_kv_heads * bool(line.get("keeps_target", True))
    if "layers" not in line:
        return needed_bytes(run) + decoder.num_layers * target
    # Layers alone, without embeddings and features: those of the middle one of three stages.
    three = replace(run.parallel, decoder=replace(run.parallel.decoder, pipeline=3))
    model = replace(run.model, decoder=replace(decoder, num_layers=3 * line["layers"]))
    held = decoder_parameters(replace(run, model=model, parallel=three), 1)
    apart = replace(run.parallel, vision=VisionParallel(placement="dedicated", num_ranks=1))
    alone = replace(run, parallel=apart)
    memory = decoder_memory(alone, 0, held, num_labels=0, num_patches=0)
    is_once = line["recompute"] in ("selective", "full")
    return memory.total + (1 if is_once else line["layers"]) * target


def run_of(line: dict[str, Any]) -> RunConfig:
    """Return the run that was measured."""
    base = load_recipe("keye_two_gpus")(num_ranks=2, has_gpu=True)
    fusions = "auto" if line["fused"] else "off"
    settings = [f"training.fusions.{name}={fusions}" for name in ("swiglu", "norm")]
    settings.append("training.expert_layers=transformer_engine")
    if "layers" not in line:
        return base.with_overrides([*settings, *line["settings"]])
    degrees = DecoderParallel(context=line["gpus"], expert=line["gpus"])
    alone = replace(base, parallel=ParallelConfig(decoder=degrees))
    return alone.with_overrides(
        [
            *settings,
            f"model.decoder.num_layers={line['layers']}",
            f"data.row_tokens={line['tokens']}",
            f"training.phase={line['phase']}",
            f"training.recompute={line['recompute']}",
            "training.rows_per_step=1",
        ]
    )


def row_of(line: dict[str, Any], run: RunConfig) -> RowSizes:
    """Return the sizes of a row of a whole step: one video."""
    padding = run.data.row_tokens - line["document_tokens"]
    patches = [line["patches"]] * line["pictures"]
    return RowSizes([line["document_tokens"], padding], patches, num_padding=padding)


def _lines() -> Iterator[dict[str, Any]]:
    for text in MEASURED.read_text().splitlines():
        yield json.loads(text)


def _comparison(line: dict[str, Any], measured: float, predicted: float) -> Comparison:
    what = line["what"]
    if "layers" in line:
        what += f", {line['tokens'] // 1024}K, recompute {line['recompute']}"
    where = f"{line['gpus']} {line['gpu'].upper()}"
    return Comparison(f"{where}: {what}", line["commit"], measured, predicted)


def _table(head: str, comparisons: list[Comparison]) -> str:
    lines = [f"| run | commit | {head} | predicted | error |", "| --- | --- | --- | --- | --- |"]
    for each in comparisons:
        error = "calibrates" if each.calibrates else f"{each.error:+.1%}" + "*" * each.shaped
        lines.append(
            f"| {each.run} | {each.commit} | {each.measured:,.0f} | {each.predicted:,.0f} "
            f"| {error} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
