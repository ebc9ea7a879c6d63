# SPDX-License-Identifier: Apache-2.0
"""The table of one run of a benchmark: kernels as they are compared, all other lines whole."""

from collections.abc import Mapping, Sequence
from typing import Any

Line = Mapping[str, Any]
_KIBI = 1024
_KERNEL = ("op", "impl", "median_us", "p10_us", "p90_us", "tflop_per_s", "shape")
_ABOVE = ("gpu", "device", "commit", "command")
_VERSIONS = ("torch", "triton", "megatron_core", "transformer_engine", "dali", "av", "zarr")


def run_table(lines: Sequence[Line], device: str) -> str:
    """Return the table of a run, below a line of device, versions, commit and command.

    Args:
        lines: Lines of one device, commit and command.
        device: The device's name.
    """
    versions = [f"{name} {lines[0][name]}" for name in _VERSIONS if name in lines[0]]
    command = str(lines[0].get("command", "")).strip()
    head = ", ".join([device, *versions, f"commit {lines[0]['commit']}"])
    head += f"; `{command}`" if command else ""
    if all(name in line for line in lines for name in _KERNEL):
        return f"{head}\n\n{_kernel_table(lines)}"
    rest = [
        {key: value for key, value in _flat(line).items() if key not in (*_ABOVE, *_VERSIONS)}
        for line in lines
    ]
    columns = list(dict.fromkeys(key for line in rest for key in line))
    same = [key for key in columns if len(lines) > 1 and all(_same(key, rest))]
    shown = [key for key in columns if key not in same]
    told = ", ".join(f"{_words(key)} {_value(rest[0][key])}" for key in same)
    table = "\n".join(
        f"| {' | '.join(cells)} |"
        for cells in (
            [_words(key) for key in shown],
            ["---"] * len(shown),
            *([_value(line.get(key, "")) for key in shown] for line in rest),
        )
    )
    return f"{head}\n\n" + (f"All lines: {told}.\n\n" if told else "") + table + "\n"


def _same(key: str, lines: Sequence[Line]) -> list[bool]:
    return [key in line and line[key] == lines[0].get(key) for line in lines]


def _flat(line: Line) -> dict[str, Any]:
    """Return a line with the fields of its objects beside its own."""
    flat: dict[str, Any] = {}
    for key, value in line.items():
        flat |= value if isinstance(value, Mapping) else {key: value}
    return flat


def _words(key: str) -> str:
    return key.replace("_", " ")


def _value(value: Any) -> str:
    """Return a value as a cell shows it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    return " ".join(str(value).replace("|", "\\|").split())


def _kernel_table(lines: Sequence[Line]) -> str:
    rows = [
        "| tokens | selection | operator | median (p10 to p90) | TFLOP/s | speed-up |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for line in lines:
        median, low, high = (_time(line[f"{name}_us"]) for name in ("median", "p10", "p90"))
        compared = f"{line['times_faster']:.2f}x {line['peer']}" if "peer" in line else ""
        speed = f"{line['tflop_per_s']:.0f}" if line["tflop_per_s"] else ""
        rows.append(
            f"| {_tokens(line['shape'])} | {line.get('selection', '')} | {line['op']}, "
            f"{line['impl']} | {median} ({low} to {high}) | {speed} | {compared} |"
        )
    return "\n".join(rows) + "\n"


def _tokens(shape: Mapping[str, int]) -> str:
    """Format the number of keys, or of patches, after the batch size if there is one."""
    tokens = shape.get("S", max(shape.values(), default=0))
    text = f"{tokens // _KIBI}K" if tokens % _KIBI == 0 else str(tokens)
    return f"{shape['B']} x {text}" if "B" in shape else text


def _time(microseconds: float) -> str:
    if microseconds < 1e3:
        return f"{microseconds:.0f} us"
    return f"{microseconds / 1e3:.2f} ms" if microseconds < 1e5 else f"{microseconds / 1e3:.0f} ms"
