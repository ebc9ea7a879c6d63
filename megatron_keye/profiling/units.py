# SPDX-License-Identifier: Apache-2.0
"""Numbers as people read them: three digits and a unit."""

_SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))
_BYTES = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))
_RATES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""))


def duration(seconds: float) -> str:
    """Return seconds as "12.3 ms"."""
    return _scaled(seconds, _SECONDS)


def size(num_bytes: float) -> str:
    """Return bytes as "1.25 GiB"."""
    return _scaled(num_bytes, _BYTES)


def rate(per_second: float, unit: str) -> str:
    """Return a rate as "312 TFLOP/s" for the unit "FLOP/s"; "" for 0."""
    return _scaled(per_second, _RATES, unit) if per_second else ""


def percent(share: float) -> str:
    """Return a share as "12.3 %"."""
    return f"{share * 100:.1f} %"


def _scaled(value: float, scales: tuple[tuple[float, str], ...], unit: str = "") -> str:
    if value == 0:
        return f"0 {unit or scales[-1][1]}"
    factor, prefix = next((each for each in scales if abs(value) >= each[0]), scales[-1])
    scaled = value / factor
    digits = 0 if abs(scaled) >= 99.95 else 1 if abs(scaled) >= 9.995 else 2
    return f"{scaled:,.{digits}f} {prefix}{unit}"
