# SPDX-License-Identifier: Apache-2.0
"""Image files written by hand, in kinds that Pillow reads but does not write."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_PNG_SAMPLES = {
    "grey": (0, 1),
    "rgb": (2, 3),
    "palette": (3, 1),
    "grey+a": (4, 2),
    "rgb+a": (6, 4),
}
_SAMPLE_FORMATS = {"u": 1, "i": 2, "f": 3}
WIDTH, BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLES_PER_PIXEL, EXTRA_SAMPLES = 256, 258, 262, 277, 338


def write_tiff(
    path: Path, values: NDArray[Any], tags: dict[int, int] | None = None, *, order: str = "<"
) -> Path:
    """Write a grey TIFF of one strip.

    Args:
        path: File.
        values: What is stored of each row, [height, numbers].
        tags: Tags in place of those that follow from the numbers.
        order: Of bytes, "<" or ">".
    """
    height, width = values.shape
    stored = values.astype(values.dtype.newbyteorder(order)).tobytes()
    entries = {WIDTH: width, 257: height, BITS_PER_SAMPLE: 8 * values.itemsize, 259: 1}
    entries |= {PHOTOMETRIC: 1, 273: 8, SAMPLES_PER_PIXEL: 1, 278: height, 279: len(stored)}
    entries |= {339: _SAMPLE_FORMATS[values.dtype.kind]} | (tags or {})
    content = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8 + len(stored))
    content += stored + struct.pack(f"{order}H", len(entries))
    for tag, value in sorted(entries.items()):
        content += struct.pack(f"{order}HHII", tag, 4, 1, value)
    path.write_bytes(content + bytes(4))
    return path


def write_png(
    path: Path, lines: NDArray[np.uint8], color: str, bits: int, *chunks: tuple[bytes, bytes]
) -> Path:
    """Write a PNG.

    Args:
        path: File.
        lines: Packed bytes of each row, [height, bytes].
        color: A key of _PNG_SAMPLES.
        bits: Of each sample.
        chunks: Kind and content of more chunks, such as a palette.
    """
    kind, num_samples = _PNG_SAMPLES[color]
    width = lines.shape[1] * 8 // (bits * num_samples)
    header = struct.pack(">IIBBBBB", width, len(lines), bits, kind, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + line.tobytes() for line in lines))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*part) for part in parts))
    return path


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """Return a PNG chunk with its length and checksum."""
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I4s", len(content), kind) + content + struct.pack(">I", checksum)
