# SPDX-License-Identifier: Apache-2.0
"""Work over pairs of queries and keys: attention of the decoder, and its indexer.

A tensor rank has a share of the heads of attention, but all heads of the indexer, which is
replicated: there its share of the model's work is less than what it runs.

Kernels keep no matrix of queries by keys. Their backward passes multiply queries and keys again,
and so does the indexer's loss, for the attention weights that it learns from.
"""

from megatron_keye.config.run import RunConfig
from megatron_keye.estimate.account.counts import RowCounts
from megatron_keye.estimate.account.linears import Linear, Rows, linear_work
from megatron_keye.estimate.account.work import Passes, Work, widened
from megatron_keye.estimate.state import BYTES
from megatron_keye.plan.cost import pair_flops, score_flops

_INDEX_BYTES = 4
_STATISTIC_BYTES = 4
"""Of a log-sum-exp, an indexer's gate or score."""


def attention_works(run: RunConfig, counts: RowCounts) -> list[Work]:
    """Return one layer's works over pairs, on one tensor rank.

    Args:
        run: Sizes, degrees, recomputation and what learns.
        counts: Of rows, or of a context rank's parts of them.
    """
    works = [_attention(run, counts)]
    if counts.phase == "sparse":
        works += [_scores(run, counts), _top_k(run, counts), _sparse_loss(run, counts)]
        works.append(_recall(run, counts))
    elif counts.phase == "indexer_warmup":
        works.append(_dense_loss(run, counts))
    return works


def indexer_projections(run: RunConfig, counts: RowCounts) -> Work:
    """Return the work of the indexer's linears on one tensor rank; their input has no gradient."""
    decoder, indexer = run.model.decoder, run.model.decoder.indexer
    learns = "indexer" in run.training.trained_parts
    width = decoder.hidden_size
    linears = [
        Linear(inputs=width, outputs=outputs, learns=learns, passes_gradients=False)
        for outputs in ((indexer.head_dim + 1) * indexer.num_heads, indexer.head_dim)
    ]
    tokens = counts.laid.num_tokens
    rows = Rows(
        real=counts.real.num_tokens / run.parallel.decoder.tensor,
        laid=tokens,
        num_passes=counts.num_rows,
    )
    # The first pass over a layer selects with it, but the warm-up selects nothing.
    repeats = is_layer_recomputed(run) and counts.phase == "sparse"
    return linear_work("decoder.indexer.projections", linears, rows, run, num_repeats=int(repeats))


def is_layer_recomputed(run: RunConfig) -> bool:
    """Return whether the backward pass runs whole layers again."""
    return run.training.recompute in ("selective", "full")


def _attention(run: RunConfig, counts: RowCounts) -> Work:
    """Attend: two products a pair, four in the backward pass, which first repeats one."""
    decoder, tensor = run.model.decoder, run.parallel.decoder.tensor
    is_sparse = counts.phase == "sparse"
    has_backward = not run.training.only_indexers_learn
    is_repeated = run.training.recompute == "full"
    of_pair, size = pair_flops(decoder) / tensor, BYTES[run.training.precision]
    once = Passes(forward=of_pair, backward=2 * of_pair * has_backward)
    again = (0.5 * has_backward + is_repeated) * of_pair
    tokens = counts.laid.num_tokens
    head = size * decoder.num_heads * decoder.head_dim / tensor * tokens
    group = size * decoder.num_kv_heads * decoder.head_dim / tensor * counts.num_keys
    beside = _STATISTIC_BYTES * decoder.num_heads / tensor * tokens
    beside += _INDEX_BYTES * decoder.indexer.top_k * tokens * is_sparse
    forward = 2 * head + 2 * group + beside
    return Work(
        module="decoder.attention.selected" if is_sparse else "decoder.attention.dense",
        precision=run.training.precision,
        model_flops=once * counts.real.attended,
        executed_flops=(once + Passes(recomputed=again)) * counts.laid.attended,
        moved_bytes=Passes(
            forward=forward,
            backward=(4 * head + 4 * group + beside) * has_backward,
            recomputed=forward * is_repeated,
        ),
    )


def _indexer_bytes(run: RunConfig, counts: RowCounts) -> float:
    """Return the bytes of the indexer's queries, gates and keys."""
    indexer, size = run.model.decoder.indexer, BYTES[run.training.precision]
    of_query = indexer.num_heads * (size * indexer.head_dim + _STATISTIC_BYTES)
    return of_query * counts.laid.num_tokens + size * indexer.head_dim * counts.num_keys


def _scores(run: RunConfig, counts: RowCounts) -> Work:
    """Score all pairs to select from; what it learns from is counted with its loss."""
    flops = score_flops(run.model.decoder)
    share = counts.real.scored / run.parallel.decoder.tensor
    return Work(
        module="decoder.indexer.scores",
        precision=run.training.precision,
        model_flops=Passes(forward=flops * share),
        executed_flops=Passes(forward=flops * counts.laid.scored),
        moved_bytes=Passes(forward=_indexer_bytes(run, counts)),
    )


def _top_k(run: RunConfig, counts: RowCounts) -> Work:
    """Select among scores, which one kernel with `_scores` need not write down."""
    selection = _INDEX_BYTES * run.model.decoder.indexer.top_k * counts.laid.num_tokens
    return Work(
        module="decoder.indexer.top_k",
        precision=widened(run.training.precision),
        moved_bytes=Passes(forward=float(selection)),
    )


def _sparse_loss(run: RunConfig, counts: RowCounts) -> Work:
    """Score the selected keys, and teach these scores by the attention weights of the same keys.

    The scores are those of the selection once more. All of it runs in the pass that has gradients.
    """
    decoder, tensor = run.model.decoder, run.parallel.decoder.tensor
    learns = "indexer" in run.training.trained_parts
    scores, logits = score_flops(decoder), pair_flops(decoder) / 2 / tensor
    tokens, size = counts.laid.num_tokens, BYTES[run.training.precision]
    selected = (_INDEX_BYTES + _STATISTIC_BYTES) * decoder.indexer.top_k * tokens
    heads = size * decoder.num_heads * decoder.head_dim / tensor * tokens
    heads += size * decoder.num_kv_heads * decoder.head_dim / tensor * counts.num_keys
    forward = _indexer_bytes(run, counts) + selected
    backward = heads + selected + 2 * learns * _indexer_bytes(run, counts)
    again = Passes(recomputed=scores * learns + logits)
    executed = _in_graded_pass(run, Passes(forward=scores, backward=2 * scores * learns))
    return Work(
        module="decoder.indexer.loss",
        precision=run.training.precision,
        model_flops=Passes(backward=2 * scores * learns * counts.real.attended / tensor),
        executed_flops=(executed + again) * counts.laid.attended,
        moved_bytes=_in_graded_pass(run, Passes(forward=forward, backward=backward)),
    )


def _dense_loss(run: RunConfig, counts: RowCounts) -> Work:
    """Teach the scores of all keys by dense attention weights, gradients made in the same call.

    Of the scores' products, one is for their log-sum-exp, one for the loss, and two for each of
    the two gradients: it and the scores, whose sign it needs.
    """
    decoder, tensor = run.model.decoder, run.parallel.decoder.tensor
    scores, logits = score_flops(decoder), pair_flops(decoder) / 2 / tensor
    size, tokens = BYTES[run.training.precision], counts.laid.num_tokens
    heads = size * decoder.num_heads * decoder.head_dim / tensor * tokens
    heads += size * decoder.num_kv_heads * decoder.head_dim / tensor * counts.num_keys
    heads += _STATISTIC_BYTES * decoder.num_heads / tensor * tokens
    return Work(
        module="decoder.indexer.loss",
        precision=run.training.precision,
        model_flops=Passes(forward=scores, backward=2 * scores) * (counts.real.scored / tensor),
        executed_flops=_in_graded_pass(run, Passes(forward=6 * scores + logits))
        * counts.laid.scored,
        moved_bytes=_in_graded_pass(run, Passes(forward=heads + 2 * _indexer_bytes(run, counts))),
    )


def _recall(run: RunConfig, counts: RowCounts) -> Work:
    """Measure the selection on a few queries, by their dense logits."""
    decoder = run.model.decoder
    heads = decoder.num_heads / run.parallel.decoder.tensor
    flops = 2 * heads * decoder.head_dim * counts.num_measured
    return Work(
        module="decoder.indexer.recall",
        precision=widened(run.training.precision),
        executed_flops=_in_graded_pass(run, Passes(forward=flops)),
    )


def _in_graded_pass(run: RunConfig, passes: Passes) -> Passes:
    """Return what runs where gradients are made: in a recomputed layer's second pass."""
    if not is_layer_recomputed(run):
        return passes
    return Passes(backward=passes.forward + passes.backward, recomputed=passes.recomputed)
