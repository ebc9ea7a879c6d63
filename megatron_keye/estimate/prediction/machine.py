# SPDX-License-Identifier: Apache-2.0
"""What a GPU reaches, in a few numbers, and how it sits among others.

`machines.py` has those of known GPUs; `megatron-keye doctor --rates` measures those of a machine.
"""

import json
import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from megatron_keye.config.check import suggest
from megatron_keye.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One GPU of a node. All rates are sustained ones, and count 1e9 bytes as a gigabyte."""

    name: str
    """What it is called."""
    memory_gibibytes: float
    """Memory that torch sees."""
    matmul_tflops: float
    """Product of two bf16 matrices of 8192 x 8192."""
    copy_gigabytes_per_second: float
    """Bytes read and written by a copy in memory."""
    gather_gigabytes_per_second: float
    """Bytes read from rows of 2 KiB at random places."""
    reduce_gigabytes_per_second: float
    """Bytes of float32 rows of 512 bytes that are added to rows at random places."""
    all_gather_gigabytes_per_second: float
    """Bytes that a rank receives, in a node; so too for a reduce-scatter."""
    all_to_all_gigabytes_per_second: float
    """Bytes that a rank sends to others in its node."""
    between_nodes_gigabytes_per_second: float
    """Bytes that a rank exchanges with other nodes."""
    host_gigabytes_per_second: float
    """Bytes between GPU and main memory, one way."""
    decoded_frames_per_second: float
    """Frames of 720p video in H.264 that pass its decoder."""
    gpus_per_node: int = 8
    """GPUs that reach each other without a network."""
    sources: dict[str, str] = field(default_factory=dict)
    """Where each number is from, by the name of its field."""


def read_machine(file: Path, machine: Machine) -> Machine:
    """Return a machine with the rates that `megatron-keye doctor --rates` wrote.

    Args:
        file: Its JSON.
        machine: Gives what the file does not measure, which is counted in `sources`.

    Raises:
        UserError: For a file that is none of these.
    """
    hint = "expected the file that megatron-keye doctor --rates wrote"
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--rates: {file} cannot be read ({error}), {hint}") from error
    rates = found.get("rates") if isinstance(found, dict) else None
    if not isinstance(rates, dict) or not rates:
        raise UserError(f"--rates: got {file} without rates, {hint}")
    known = {f.name for f in fields(Machine)} - {"name", "sources", "gpus_per_node"}
    for name, rate in rates.items():
        if name not in known:
            raise UserError(f"--rates: {file} has {name!r}; {suggest(name, known)}")
        if not _is_rate(rate):
            raise UserError(f"--rates: {file} has {name} = {rate!r}, expected a number above 0")
    missing = sorted(known - {*rates})
    sources = dict.fromkeys(rates, f"measured: {file.name}")
    sources |= dict.fromkeys(missing, f"not measured: that of {machine.name}")
    name = str(found.get("device", file.stem))
    return replace(machine, name=name, sources=sources, **rates)


def _is_rate(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 < float(value) < math.inf  # type: ignore[arg-type]
