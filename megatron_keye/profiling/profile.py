# SPDX-License-Identifier: Apache-2.0
"""The profile of a run: what a report shows, and profile.json holds."""

import json
import typing
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from megatron_keye.errors import UserError
from megatron_keye.profiling.communication import ExchangeSum
from megatron_keye.profiling.memory import StepMemory
from megatron_keye.profiling.rank_step import KernelSum
from megatron_keye.profiling.spread import Spread

FORMAT = 1
"""Version of profile.json."""


@dataclass(frozen=True, kw_only=True)
class ModuleTime:
    """One module on one rank, over the traced steps."""

    module: str
    """One of PLACES (`places.py`)."""
    seconds: Spread
    """Of all its passes."""
    passes: dict[str, float]
    """Median seconds of each pass, "forward", "backward" and "recomputed"."""
    share: float
    """Of the last traced step, like the rates, so that shares add up."""
    flops: float
    """Executed FLOPs of the last traced step, by the account; 0 where it has none."""
    flops_per_second: float
    """Of the last traced step."""
    moved_bytes: float
    """Bytes that it moves at least, by the account."""
    bytes_per_second: float
    """Likewise."""
    roofline: float | None
    """Share of the roofline: the least time over the measured one; None without a known peak, or
    without work in the account."""


@dataclass(frozen=True, kw_only=True)
class RankProfile:
    """One rank."""

    rank: int
    role: str
    """Its place in the grids, in words."""
    phases: dict[str, Spread]
    """Seconds of each kind of span, over the timed steps."""
    idle: Spread
    """Share of the timed steps in which no span but waits ran."""
    peak_memory_mib: float
    """Most memory of tensors in the timed steps; 0 on a CPU."""
    modules: list[ModuleTime]
    """In the order in which they run; empty for ranks that were not traced."""
    kernels: list[KernelSum]
    """Longest of the last traced step."""
    exchanges: list[ExchangeSum]
    """Of the last traced step."""
    exposed_share: float
    """Of the last traced step: time in which this rank did nothing but exchange."""
    busy_share: float
    """Of the last traced step: time in which it computed."""
    memory: StepMemory | None
    """Of the last traced step."""


@dataclass(frozen=True, kw_only=True)
class Extrapolation:
    """What the whole model would take, from a few of its layers."""

    measured_layers: int
    whole_layers: int
    layer_seconds: float
    """Measured, in modules of layers; they are multiplied by the ratio of layers."""
    update_seconds: float
    """Measured, in the optimizer; they are multiplied by the ratio of weights."""
    rest_seconds: float
    """Measured, in everything else, which stays."""
    weight_ratio: float
    """Weights of the whole model over those of the measured one."""

    @property
    def whole_seconds(self) -> float:
        """A step of the whole model on as many ranks, if it fitted."""
        layers = self.layer_seconds * self.whole_layers / self.measured_layers
        return layers + self.update_seconds * self.weight_ratio + self.rest_seconds


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One profiled run."""

    format: int
    name: str
    """The run's."""
    layout: str
    """Its degrees, in words."""
    settings: list[str]
    """Settings that the command changed, as --set has them."""
    device: str
    """Name of the GPU, or "CPU"."""
    versions: dict[str, str]
    num_warm_up: int
    """Steps before the timed ones."""
    num_traced: int
    """Steps after the timed ones, which torch's profiler slows."""
    step_seconds: Spread
    """Of a timed step, from the common start to the last rank's end."""
    tokens_per_second: Spread
    """Real tokens of the global batch over the time from one step's end to the next."""
    mfu: Spread | None
    """Model FLOPs utilization; None where the device's peak is not known."""
    data_wait_seconds: Spread
    """Waits for rows before a step, on the rank that waited longest."""
    save_seconds: Spread
    """In which training stood still for a checkpoint, on the slowest rank."""
    traced_ratio: float
    """A traced step's time over that of a timed one."""
    documents: list[list[int]]
    """Lengths of documents in each row of the last traced step."""
    ranks: list[RankProfile]
    extrapolation: Extrapolation | None
    """Where the run had fewer layers than the recipe."""

    def to_json(self) -> str:
        """Return the profile as JSON."""
        return json.dumps(asdict(self), indent=1) + "\n"


def read_profile(file: Path) -> Profile:
    """Read what `to_json` wrote.

    Raises:
        UserError: When the file holds no profile of this version.
    """
    try:
        tree = json.loads(file.read_text())
        found = tree["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file}: got {type(error).__name__} while reading, expected profile.json of "
            "megatron-keye profile"
        ) from None
    if found != FORMAT:
        raise UserError(f"{file}: got format {found!r}, expected {FORMAT}; profile the run again")
    return typing.cast(Profile, _build(Profile, tree))


def _build(kind: Any, value: Any) -> Any:
    """Return JSON data as a value of a type of this file."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if is_dataclass(kind):
        hints, names = typing.get_type_hints(kind), [field.name for field in fields(kind)]
        known = {name: _build(hints[name], value[name]) for name in names}
        return typing.cast(type, kind)(**known)
    if origin is list:
        return [_build(arguments[0], each) for each in value]
    if origin is dict:
        return {name: _build(arguments[1], each) for name, each in value.items()}
    if type(None) in arguments:
        return None if value is None else _build(arguments[0], value)
    return value
