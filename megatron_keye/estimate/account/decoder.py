# SPDX-License-Identifier: Apache-2.0
"""Work of the decoder on one tensor rank: of a layer, and of what comes before and after all.

Weights of attention and vocabulary are split over tensor ranks, which all see the tokens of their
context rank; between them each has a part of the tokens, for norms, router and experts.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_keye.config.run import RunConfig
from megatron_keye.estimate.account.attention import (
    attention_works,
    indexer_projections,
    is_layer_recomputed,
)
from megatron_keye.estimate.account.counts import RowCounts
from megatron_keye.estimate.account.linears import (
    Linear,
    Rows,
    adapter_rank,
    linear_work,
    with_adapter,
)
from megatron_keye.estimate.account.work import Passes, Work, widened
from megatron_keye.estimate.state import BYTES, SUM_BYTES


def layer_works(run: RunConfig, counts: Sequence[RowCounts]) -> list[Work]:
    """Return the works of one decoder layer on one tensor rank.

    Args:
        run: Sizes, degrees, recomputation and what learns.
        counts: Of rows, or of a context rank's parts of them, by phase.
    """
    works = []
    for each in counts:
        works += [_layer_norms(run, each), _projections(run, each), *attention_works(run, each)]
        if each.phase != "dense":
            works.append(indexer_projections(run, each))
        works += [_router(run, each), _experts(run, each)]
    return works


def embedding_work(run: RunConfig, counts: Sequence[RowCounts]) -> Work:
    """Return the work of looking up a tensor rank's part of the tokens; backward adds them up."""
    width = run.model.decoder.hidden_size
    rows = _rows(counts, num_sharers=run.parallel.decoder.tensor)
    size, of_sum = BYTES[run.training.precision], SUM_BYTES[run.training.precision]
    learns = _weights_learn(run)
    moved = Passes(forward=2 * size * width, backward=(size + of_sum) * width * learns)
    return Work(
        module="embedding", precision=run.training.precision, moved_bytes=moved * rows.laid
    )


def output_works(run: RunConfig, counts: Sequence[RowCounts]) -> list[Work]:
    """Return the works behind the last layer: its norm, and the logits of labelled tokens."""
    decoder, tensor = run.model.decoder, run.parallel.decoder.tensor
    num_labels = sum(each.num_labels for each in counts)
    num_rows = sum(each.num_rows for each in counts)
    linear = Linear(
        inputs=decoder.hidden_size,
        outputs=decoder.vocab_size / tensor,
        learns=_weights_learn(run),
    )
    rows = Rows(real=num_labels, laid=num_labels, num_passes=num_rows)
    logits = linear_work("vocabulary", [linear], rows, run)
    if run.training.only_indexers_learn:
        # The loss has a backward pass as ever, whose gradient reaches nothing that learns.
        logits = _without_model_gradients(logits)
    numbers = decoder.hidden_size * _rows(counts, num_sharers=tensor).laid
    size = BYTES[run.training.precision]
    moved = Passes(forward=2 * size, backward=3 * size) * numbers
    norm = Work(module="decoder.norms", precision=run.training.precision, moved_bytes=moved)
    return [norm, logits]


def _without_model_gradients(work: Work) -> Work:
    """Return work whose backward pass runs, but is none of the model's mathematics."""
    kept = Passes(forward=work.model_flops.forward)
    return replace(work, model_flops=kept)


def _rows(counts: Sequence[RowCounts], *, num_sharers: int) -> Rows:
    """Return the tokens that one of some tensor ranks has to itself."""
    return Rows(
        real=sum(each.real.num_tokens for each in counts) / num_sharers,
        laid=sum(each.laid.num_tokens for each in counts) / num_sharers,
        num_passes=sum(each.num_rows for each in counts),
    )


def _weights_learn(run: RunConfig) -> bool:
    return run.training.is_trained("decoder", is_adapter=False)


def _layer_norms(run: RunConfig, counts: RowCounts) -> Work:
    """Norm before attention and before experts, with the sums before them; of queries and keys.

    A sum reads the stream and what is added, and writes the new stream and its norm.
    """
    decoder, tensor = run.model.decoder, run.parallel.decoder.tensor
    heads = (decoder.num_heads + decoder.num_kv_heads) * decoder.head_dim
    numbers = counts.laid.num_tokens / tensor * BYTES[run.training.precision]
    has_backward = not run.training.only_indexers_learn
    forward = (2 * 4 * decoder.hidden_size + 2 * heads) * numbers
    backward = (2 * 4 * decoder.hidden_size + 3 * heads) * numbers
    return Work(
        module="decoder.norms",
        precision=run.training.precision,
        moved_bytes=Passes(
            forward=forward,
            backward=backward * has_backward,
            recomputed=forward * is_layer_recomputed(run),
        ),
    )


def _projections(run: RunConfig, counts: RowCounts) -> Work:
    """Queries, keys and values of all heads from the hidden state, and back from all heads."""
    decoder, tensor = run.model.decoder, run.parallel.decoder.tensor
    width, learns = decoder.hidden_size, _weights_learn(run)
    heads = decoder.num_heads * decoder.head_dim / tensor
    groups = decoder.num_kv_heads * decoder.head_dim / tensor
    passes = not run.training.only_indexers_learn
    build: dict[str, Any] = {"learns": learns, "passes_gradients": passes}
    into = Linear(inputs=width, outputs=heads + 2 * groups, **build)
    out = Linear(inputs=heads, outputs=width, **build)
    rank = adapter_rank(run, "attention")
    linears = [
        *with_adapter(into, rank, shares=(1 / tensor, 1)),
        *with_adapter(out, rank, shares=(1, 1 / tensor)),
    ]
    rows = _rows([counts], num_sharers=1)
    repeats = int(is_layer_recomputed(run))
    return linear_work("decoder.attention.projections", linears, rows, run, num_repeats=repeats)


def _router(run: RunConfig, counts: RowCounts) -> Work:
    """Multiply in float32 or better, which gives the logits of all experts."""
    decoder = run.model.decoder
    linear = Linear(
        inputs=decoder.hidden_size,
        outputs=decoder.experts.num_experts,
        learns=_weights_learn(run),
        passes_gradients=not run.training.only_indexers_learn,
    )
    rows = _rows([counts], num_sharers=run.parallel.decoder.tensor)
    return linear_work(
        "decoder.router",
        [linear],
        rows,
        run,
        num_repeats=_num_expert_repeats(run),
        precision=widened(run.training.precision),
    )


def _experts(run: RunConfig, counts: RowCounts) -> Work:
    """Gate, value and output of the experts of each token, evenly routed to the expert ranks."""
    decoder, experts = run.model.decoder, run.model.decoder.experts
    degrees, inner = run.parallel.decoder, experts.intermediate_size
    build: dict[str, Any] = {
        "learns": _weights_learn(run),
        "passes_gradients": not run.training.only_indexers_learn,
        "num_weights": experts.num_experts // degrees.expert,
    }
    rank = adapter_rank(run, "experts")
    linears = [
        *with_adapter(Linear(inputs=decoder.hidden_size, outputs=2 * inner, **build), rank),
        *with_adapter(Linear(inputs=inner, outputs=decoder.hidden_size, **build), rank),
    ]
    tokens = _rows([counts], num_sharers=degrees.tensor)
    routed = experts.num_experts_per_token
    rows = Rows(real=tokens.real * routed, laid=tokens.laid * routed, num_passes=tokens.num_passes)
    repeats = _num_expert_repeats(run)
    return linear_work("decoder.experts", linears, rows, run, num_repeats=repeats)


def _num_expert_repeats(run: RunConfig) -> int:
    """Return how often experts run again; by themselves only for a backward pass of their own."""
    alone = run.training.recompute == "experts" and not run.training.only_indexers_learn
    return int(alone or is_layer_recomputed(run))
