# SPDX-License-Identifier: Apache-2.0
"""The time of one decoder layer on one rank, part by part, from the account of its work."""

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_keye.config.run import RunConfig
from megatron_keye.estimate.account.counts import RowCounts
from megatron_keye.estimate.account.decoder import layer_works
from megatron_keye.estimate.account.work import Work
from megatron_keye.estimate.prediction import operators
from megatron_keye.estimate.prediction.exchanges import Group, all_to_all_seconds, gather_seconds
from megatron_keye.estimate.prediction.machine import Machine
from megatron_keye.estimate.prediction.machines import H100
from megatron_keye.estimate.prediction.mix import Rates, RowMix
from megatron_keye.estimate.state import BYTES

_TERA = 1e12


@dataclass(frozen=True)
class Seconds:
    """Time of a forward and of a backward pass, with what the latter computes again."""

    forward: float = 0.0
    """Of the forward pass."""
    backward: float = 0.0
    """Of the backward pass."""

    @property
    def total(self) -> float:
        """Both together."""
        return self.forward + self.backward

    def __add__(self, other: "Seconds") -> "Seconds":
        """Return the sum."""
        return Seconds(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, factor: float) -> "Seconds":
        """Return both times a factor."""
        return Seconds(self.forward * factor, self.backward * factor)


def layer_seconds(run: RunConfig, mix: RowMix, machine: Machine) -> dict[str, Seconds]:
    """Return the mean time of a row in one decoder layer on one rank, by part.

    Args:
        run: Sizes, degrees, recomputation.
        mix: Rows.
        machine: The GPU.

    Returns:
        Seconds of "attention", "indexer", "experts", "linears", "elementwise" (norms, permutation
        of rows, SwiGLU, and all else that is no product), "all-to-all", "tensor" and "context"
        (exchanges that nothing hides), and "launches": what the host needs beyond all of these.
    """
    counts = mix.counts(run.parallel.decoder.context)
    parts: dict[str, Seconds] = {}
    for each in counts:
        rates = mix.rates(each.phase)
        for work in layer_works(run, [each]):
            name, seconds = _work_seconds(work, each, run, machine, rates)
            parts[name] = parts.get(name, Seconds()) + seconds
    parts["elementwise"] = parts["elementwise"] + _row_seconds(run, counts, machine)
    parts |= _exchange_seconds(run, counts, machine, parts)
    num_rows = sum(each.num_rows for each in counts)
    return _with_launches({name: each * (1 / num_rows) for name, each in parts.items()}, run)


def _work_seconds(
    work: Work, counts: RowCounts, run: RunConfig, machine: Machine, rates: Rates
) -> tuple[str, Seconds]:
    flops, moved = work.executed_flops, work.moved_bytes
    compute = machine.matmul_tflops / H100.matmul_tflops
    if work.module in ("decoder.attention.selected", "decoder.attention.dense"):
        return "attention", _attention_seconds(work, machine, rates)
    if work.module == "decoder.indexer.loss":
        loss = rates.loss * compute * _TERA
        return "indexer", Seconds(flops.forward / loss, (flops.backward + flops.recomputed) / loss)
    if work.module == "decoder.indexer.scores":
        return "indexer", Seconds(flops.forward / (operators.SCORES_TFLOPS * compute * _TERA))
    if work.module == "decoder.indexer.top_k":
        each = operators.SELECTION_NANOSECONDS * 1e-9
        return "indexer", Seconds(counts.laid.num_tokens * each / compute)
    copy = machine.copy_gigabytes_per_second * 1e9
    if work.module == "decoder.norms":
        return "elementwise", Seconds(moved.forward / copy, (moved.total - moved.forward) / copy)
    rate = {
        "decoder.experts": machine.matmul_tflops * operators.EXPERT_SHARE,
        "decoder.router": operators.FLOAT32_TFLOPS * compute,
        "decoder.indexer.recall": operators.FLOAT32_TFLOPS * compute,
    }.get(work.module, machine.matmul_tflops * operators.PRODUCT_SHARE)
    name = "experts" if work.module == "decoder.experts" else "linears"
    if run.training.precision != "bf16":
        rate = operators.FLOAT32_TFLOPS * compute
    return name, Seconds(
        max(flops.forward / (rate * _TERA), moved.forward / copy),
        max(
            (flops.backward + flops.recomputed) / (rate * _TERA),
            (moved.backward + moved.recomputed) / copy,
        ),
    )


def _attention_seconds(work: Work, machine: Machine, rates: Rates) -> Seconds:
    flops = work.executed_flops
    gather = reduce = machine.matmul_tflops / H100.matmul_tflops
    if work.module == "decoder.attention.selected":
        gather = machine.gather_gigabytes_per_second / H100.gather_gigabytes_per_second
        reduce = machine.reduce_gigabytes_per_second / H100.reduce_gigabytes_per_second
    # Of what is computed again, the product of queries and keys is a part of the backward pass.
    again = 0.25 * flops.backward
    forward_rate = rates.attention_forward * gather * _TERA
    backward = (flops.backward + again) / (rates.attention_backward * reduce * _TERA)
    return Seconds(
        flops.forward / forward_rate, backward + (flops.recomputed - again) / forward_rate
    )


def _is_fused(run: RunConfig) -> bool:
    """Return whether layers run with fused kernels; "auto" counts as yes."""
    return run.training.fusions.swiglu != "off" and run.training.precision != "fp64"


def _row_seconds(run: RunConfig, counts: Iterable[RowCounts], machine: Machine) -> Seconds:
    decoder, training = run.model.decoder, run.training
    tokens = sum(each.laid.num_tokens for each in counts) / run.parallel.decoder.tensor
    of_pass: float = BYTES[training.precision] * decoder.experts.num_experts_per_token
    of_pass *= decoder.hidden_size * tokens * (1 if _is_fused(run) else operators.UNFUSED)
    copy = machine.copy_gigabytes_per_second * 1e9
    forward = operators.ROUTED_FORWARD * of_pass / copy
    backward = operators.ROUTED_BACKWARD * of_pass / copy
    if training.only_indexers_learn:
        return Seconds(forward, 0.0)
    return Seconds(forward, backward + _num_repeats(run) * forward)


def _num_repeats(run: RunConfig) -> float:
    """Return how much of a layer's forward pass, attention aside, the backward pass repeats."""
    return {"none": 0.0, "experts": 0.75, "selective": 1.0, "full": 1.0}[run.training.recompute]


def _exchange_seconds(
    run: RunConfig, counts: Iterable[RowCounts], machine: Machine, parts: dict[str, Seconds]
) -> dict[str, Seconds]:
    """Return the time of exchanges; those of context ranks run under the indexer."""
    degrees, decoder = run.parallel.decoder, run.model.decoder
    size, has_backward = BYTES[run.training.precision], not run.training.only_indexers_learn
    tokens = sum(each.laid.num_tokens for each in counts)
    again = 1 if run.training.recompute != "none" and has_backward else 0
    wholly = 1 if run.training.recompute in ("selective", "full") and has_backward else 0
    hidden = size * decoder.hidden_size * tokens
    routed = hidden / degrees.tensor * decoder.experts.num_experts_per_token
    to_experts = 2 * all_to_all_seconds(routed, Group(degrees.expert, 1), machine)
    # Before and after attention's linears, and once for the indexer, which sees all tokens.
    tensor = 3 * gather_seconds(hidden, Group(degrees.tensor, 1), machine)
    rows = 2 * size * decoder.num_kv_heads * decoder.head_dim / degrees.tensor
    rows += size * decoder.indexer.head_dim
    gathered = gather_seconds(
        rows * tokens * degrees.context, Group(degrees.context, degrees.tensor), machine
    )
    indexer = parts.get("indexer", Seconds())
    return {
        "all-to-all": Seconds(to_experts, to_experts * (has_backward + again)),
        "tensor": Seconds(tensor, tensor * (has_backward + wholly)),
        "context": Seconds(
            max(0.0, gathered - indexer.forward),
            max(0.0, gathered * (has_backward + wholly) - indexer.backward),
        ),
    }


def _with_launches(parts: dict[str, Seconds], run: RunConfig) -> dict[str, Seconds]:
    """Add what the host takes longer than the GPU, for a row."""
    launches = float(operators.LAUNCHES["layer"])
    if run.training.expert_layers != "torch":
        num_experts = run.model.decoder.experts.num_experts // run.parallel.decoder.expert
        launches += operators.LAUNCHES["expert"] * num_experts
    host = launches * operators.LAUNCH_SECONDS
    has_backward = not run.training.only_indexers_learn
    known = sum(parts.values(), Seconds())
    repeats = 2 * has_backward + (_num_repeats(run) if has_backward else 0)
    waits = Seconds(max(0.0, host - known.forward), max(0.0, host * repeats - known.backward))
    return parts | {"launches": waits}
