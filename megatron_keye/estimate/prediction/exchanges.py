# SPDX-License-Identifier: Apache-2.0
"""The time of messages between ranks, from their bytes and the links that they take."""

from dataclasses import dataclass

from megatron_keye.config.run import RunConfig
from megatron_keye.estimate.prediction.machine import Machine
from megatron_keye.estimate.state import BYTES, SUM_BYTES, Parameters

_LATENCY_SECONDS = 30e-6
"""Of one exchange; 1 MB takes 30 to 50 us over NVLink."""


@dataclass(frozen=True)
class Group:
    """Ranks that exchange with each other, spaced evenly from the first to the last."""

    size: int
    """Ranks."""
    stride: int
    """Distance between neighbours, as they are numbered."""

    def num_local(self, gpus_per_node: int) -> int:
        """Return how many of them share a node."""
        return max(1, min(self.size, gpus_per_node // self.stride))


def gather_seconds(received_bytes: float, group: Group, machine: Machine) -> float:
    """Return the time of an all-gather or a reduce-scatter.

    Args:
        received_bytes: What a rank has when all have arrived, its own included; of a
            reduce-scatter what it begins with.
        group: The ranks.
        machine: Their GPUs.
    """
    if group.size == 1:
        return 0.0
    missing = received_bytes * (group.size - 1) / group.size
    rate = machine.all_gather_gigabytes_per_second
    local = group.num_local(machine.gpus_per_node)
    if local < group.size:
        # A ring through all: every link carries as much, and those of a node share its cards.
        cards = max(1, machine.gpus_per_node // (local * group.stride)) if local == 1 else local
        rate = min(rate, machine.between_nodes_gigabytes_per_second * cards)
    return _LATENCY_SECONDS + missing / (rate * 1e9)


def all_to_all_seconds(sent_bytes: float, group: Group, machine: Machine) -> float:
    """Return the time of an exchange of equal parts, of which a rank keeps its own.

    Args:
        sent_bytes: All parts of a rank, its own included.
        group: The ranks.
        machine: Their GPUs.
    """
    if group.size == 1:
        return 0.0
    local = group.num_local(machine.gpus_per_node)
    inside = sent_bytes * (local - 1) / group.size
    outside = sent_bytes * (group.size - local) / group.size
    seconds = inside / (machine.all_to_all_gigabytes_per_second * 1e9)
    return _LATENCY_SECONDS + max(
        seconds, outside / (machine.between_nodes_gigabytes_per_second * 1e9)
    )


def message_seconds(sent_bytes: float, group: Group, machine: Machine) -> float:
    """Return the time of a message from a rank to the next one of its group."""
    if group.size == 1:
        return 0.0
    rate = machine.between_nodes_gigabytes_per_second
    if group.num_local(machine.gpus_per_node) == group.size:
        rate = machine.all_to_all_gigabytes_per_second
    return _LATENCY_SECONDS + sent_bytes / (rate * 1e9)


def gradient_seconds(run: RunConfig, held: list[Parameters], machine: Machine) -> float:
    """Return the time to sum a rank's gradients over replicas, and to gather its weights.

    Args:
        run: Degrees and precision.
        held: Parameters on the rank.
        machine: Its GPU.
    """
    degrees, precision, training = run.parallel.decoder, run.training.precision, run.training
    span = degrees.tensor * degrees.context * degrees.data
    dense = Group(degrees.context * degrees.data, degrees.tensor)
    experts = Group(span // degrees.expert, degrees.expert)
    everyone = Group(run.parallel.vision.num_ranks or degrees.num_ranks, 1)
    seconds = 0.0
    for each in held:
        if not training.is_trained(each.part, is_adapter=each.is_adapter):
            continue
        is_vision = each.part in ("vision", "projector")
        group = experts if each.is_expert else everyone if is_vision else dense
        for size in (SUM_BYTES[precision], BYTES[precision]):
            seconds += gather_seconds(size * each.count, group, machine)
    return seconds
