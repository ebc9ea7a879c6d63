# SPDX-License-Identifier: Apache-2.0
"""How long features and activations travel, from the places of ranks and the rates of links."""

from dataclasses import dataclass

import numpy as np

from megatron_keye.config.parallel import DecoderParallel
from megatron_keye.config.run import RunConfig
from megatron_keye.estimate.workload import BatchPictures, Integers, StepWork
from megatron_keye.plan.places import owned_positions

_FEATURE_BYTES = 2
"""Bytes of a number in bf16."""


@dataclass(frozen=True, kw_only=True)
class Links:
    """Links of a cluster; assumptions, to be replaced by measurements."""

    ranks_per_node: int = 8
    """Ranks that share a node, consecutive ones."""
    node_gigabytes_per_second: float = 300.0
    """Bandwidth of one rank to others of its node, in 1e9 bytes per second and direction."""
    link_gigabytes_per_second: float = 40.0
    """Bandwidth of one rank to other nodes, in 1e9 bytes per second and direction."""

    def seconds(self, num_bytes: float, *, between_nodes: bool) -> float:
        """Return how long one rank takes for so many bytes."""
        rate = self.link_gigabytes_per_second if between_nodes else self.node_gigabytes_per_second
        return num_bytes / (rate * 1e9)


def hop_seconds(run: RunConfig, links: Links) -> float:
    """Return how long activations travel from one pipeline stage to the next."""
    degrees = run.parallel.decoder
    if degrees.pipeline == 1:
        return 0.0
    tokens = run.data.row_tokens / degrees.context / degrees.tensor
    ranks_apart = degrees.num_ranks // degrees.pipeline
    return links.seconds(
        tokens * run.model.decoder.hidden_size * _FEATURE_BYTES,
        between_nodes=ranks_apart >= links.ranks_per_node,
    )


def exchange_seconds(
    pictures: BatchPictures, work: StepWork, run: RunConfig, links: Links
) -> list[float]:
    """Return the time of the exchanges of each micro-batch: that of its busiest rank.

    Args:
        pictures: Of the global batch.
        work: Chunks of these pictures.
        run: Sizes and degrees.
        links: Rates; a rank uses those within and between nodes at the same time.
    """
    parts, destinations, tokens = _parts(pictures, run)
    sources = work.ranks[work.chunk_of_picture][parts]
    micro_batches = pictures.rows[parts] // run.parallel.decoder.data
    crosses = sources // links.ranks_per_node != destinations // links.ranks_per_node
    stays = (sources != destinations) & ~crosses
    num_ranks = run.parallel.num_ranks
    token_bytes = run.model.decoder.hidden_size * _FEATURE_BYTES
    slowest = np.zeros(work.num_micro_batches)
    for ranks in (sources, destinations):
        for travels, between_nodes in ((stays, False), (crosses, True)):
            sums = np.bincount(
                micro_batches * num_ranks + ranks,
                weights=tokens * travels,
                minlength=work.num_micro_batches * num_ranks,
            )
            largest = sums.reshape(-1, num_ranks).max(axis=1) * token_bytes
            slowest = np.maximum(
                slowest, links.seconds(1.0, between_nodes=between_nodes) * largest
            )
    return slowest.tolist()


def _parts(pictures: BatchPictures, run: RunConfig) -> tuple[Integers, Integers, Integers]:
    """Return picture, first-stage rank and tokens of each part of a picture that one rank owns."""
    degrees = run.parallel.decoder
    owners = _owners(degrees)
    size = -(-run.data.row_tokens // len(owners))
    ends = pictures.starts + pictures.tokens
    first, last = pictures.starts // size, (ends - 1) // size
    counts = last - first + 1
    parts = np.repeat(np.arange(len(counts)), counts)
    pieces = first[parts] + np.arange(len(parts)) - np.repeat(np.cumsum(counts) - counts, counts)
    tokens = np.minimum(ends[parts], (pieces + 1) * size) - np.maximum(
        pictures.starts[parts], pieces * size
    )
    replicas = pictures.rows[parts] % degrees.data
    destinations = replicas * (degrees.context * degrees.tensor) + owners[pieces]
    return parts, destinations, tokens


def _owners(degrees: DecoderParallel) -> Integers:
    """Return the rank of replica 0 that owns each of the equal pieces of a row."""
    num_pieces = degrees.tensor * (2 * degrees.context if degrees.context > 1 else 1)
    owners = np.empty(num_pieces, dtype=np.int64)
    for context in range(degrees.context):
        positions = owned_positions(num_pieces, degrees.context, context)
        for tensor, part in enumerate(np.split(positions, degrees.tensor)):
            owners[part] = context * degrees.tensor + tensor
    return owners
