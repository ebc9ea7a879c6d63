# SPDX-License-Identifier: Apache-2.0
"""Lists the ranks of a run: coordinates, layers, parameters and expected memory."""

from dataclasses import dataclass

from megatron_keye.config.run import RunConfig
from megatron_keye.estimate.memory import Memory, decoder_memory, vision_memory
from megatron_keye.estimate.parameters import decoder_parameters, stage_layers, vision_parameters
from megatron_keye.estimate.state import Parameters, host_bytes
from megatron_keye.plan.places import decoder_place


@dataclass(frozen=True, kw_only=True)
class Rank:
    """One process of the job."""

    rank: int
    """Global rank."""
    role: str
    """ "decoder", "vision", or "decoder and vision" where they share ranks."""
    place: dict[str, int]
    """Coordinates in its grid, by axis."""
    layers: list[int]
    """0-based decoder layers that it holds."""
    parameters: int
    """Number of parameters that it holds."""
    memory: dict[str, float]
    """Expected memory of its device in GiB, by the fields of `Memory`."""
    host_memory: float
    """Expected main memory for offloaded state of the optimizer, in GiB."""


def plan_ranks(run: RunConfig, num_labels: int | None) -> list[Rank]:
    """Return every rank: the decoder's first, dedicated vision ranks after them.

    Args:
        run: Sizes and degrees.
        num_labels: Labelled tokens of a row; None for a 64th of its tokens.
    """
    degrees, num_dedicated = run.parallel.decoder, run.parallel.vision.num_ranks
    encodes = run.parallel.vision.decoder_encodes
    role = "decoder and vision" if encodes else "decoder"
    of_vision = vision_parameters(run)
    patches = run.data.row_tokens * run.model.vision.merge_size**2
    labels = run.data.row_tokens // 64 if num_labels is None else num_labels
    stages: list[tuple[list[Parameters], Memory]] = []
    for stage in range(degrees.pipeline):
        held = decoder_parameters(run, stage) + (of_vision if encodes else [])
        memory = decoder_memory(run, stage, held, num_labels=labels, num_patches=patches)
        stages.append((held, memory))
    ranks = []
    for rank in range(degrees.num_ranks):
        place = vars(decoder_place(degrees, rank))
        held, memory = stages[place["pipeline"]]
        ranks.append(
            Rank(
                rank=rank,
                role=role,
                place=place,
                layers=stage_layers(run, place["pipeline"]),
                parameters=_count(held),
                memory=_gibibytes(memory),
                host_memory=host_bytes(run, held) / 2**30,
            )
        )
    for number in range(num_dedicated):
        memory = vision_memory(run, of_vision, num_patches=patches)
        ranks.append(
            Rank(
                rank=degrees.num_ranks + number,
                role="vision",
                place={"data": number},
                layers=[],
                parameters=_count(of_vision),
                memory=_gibibytes(memory),
                host_memory=host_bytes(run, of_vision) / 2**30,
            )
        )
    return ranks


def _count(held: list[Parameters]) -> int:
    return sum(each.count for each in held)


def _gibibytes(memory: Memory) -> dict[str, float]:
    return {name: size / 2**30 for name, size in vars(memory).items()}
