# SPDX-License-Identifier: Apache-2.0
"""Damages files, and reads them in another process that measures its memory."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_keye.errors import UserError

DAMAGES = ("cut", "bit", "bytes", "hole")


class Case(NamedTuple):
    """A file to be written and read."""

    path: str
    content: bytes
    is_only_cut: bool


def damaged_cases(path: Path, num_cases: int, seed: int) -> Iterator[tuple[str, Case]]:
    """Yield differently damaged forms of a file with a name for each."""
    content, generator = path.read_bytes(), np.random.default_rng(seed)
    for number in range(num_cases):
        how = DAMAGES[number % len(DAMAGES)]
        yield f"{number} {how}", Case(str(path), damage(content, how, generator), how == "cut")


def damage(content: bytes, kind: str, generator: np.random.Generator) -> bytes:
    """Cut a file, flip a bit, overwrite 20 bytes with noise, or 64 in a row with zeros."""
    # Half of the damage falls into the first 256 bytes, where formats state sizes and places.
    end = len(content) if generator.integers(2) else min(256, len(content))
    place = int(generator.integers(end))
    if kind == "cut":
        return content[:place]
    damaged = bytearray(content)
    if kind == "bit":
        damaged[place] ^= 1 << int(generator.integers(8))
    elif kind == "bytes":
        for other in generator.integers(end, size=20):
            damaged[other] = int(generator.integers(256))
    else:
        damaged[place : place + 64] = bytes(len(damaged[place : place + 64]))
    return bytes(damaged)


def check_outcomes(name: str, outcomes: dict[str, str]) -> str:
    """Assert that every case was read exactly or refused, some of them refused; return counts."""
    wrong = {case: what for case, what in outcomes.items() if what not in ("error", "exact")}
    assert not wrong, f"{name}:\n" + "\n".join(f"{case}: {what}" for case, what in wrong.items())
    counts = Counter(outcomes.values())
    assert counts["error"], "no case was damaged enough to be refused"
    return f"{counts['exact']} exact, {counts['error']} refused"


def outcome_of(case: Case, compare: Callable[[Case], str], *, most_mebibytes: float) -> str:
    """Write a case, read it and return "error", "exact", or what is wrong.

    Args:
        case: What to read.
        compare: Reads the file and returns "exact", or what is wrong with what was read; raises
            what reading raises.
        most_mebibytes: Memory that reading may take in this process.
    """
    path = Path(case.path)
    path.write_bytes(case.content)
    # Makes the kernel count the peak from here on.
    Path("/proc/self/clear_refs").write_text("5")
    before, started = _mebibytes("VmRSS"), time.monotonic()
    try:
        outcome = compare(case)
    except UserError as error:
        named = str(error).startswith(f"{path}: ") and "\n" not in str(error)
        outcome = "error" if named else f"unnamed: {error}"
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    taken, seconds = _mebibytes("VmHWM") - before, time.monotonic() - started
    if outcome in ("error", "exact") and taken > most_mebibytes:
        return f"took {taken:.0f} MiB in {seconds:.1f} s, then {outcome}"
    return outcome


def _mebibytes(field: str) -> float:
    """Return a size from the kernel's account of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise AssertionError(f"/proc/self/status has no {field}")
