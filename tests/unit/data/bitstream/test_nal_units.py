# SPDX-License-Identifier: Apache-2.0
"""What headers of NAL units declare; test_segment.py decodes what is left of whole clips."""

from megatron_keye.data.bitstream.nal_units import unreferenced_frames

REFERENCE, NON_REFERENCE = 1, 0


def hevc_frame(nal_type: int, layer: int) -> bytes:
    return b"\0\0\1" + bytes([nal_type << 1, layer + 1]) + b"content"


def test_frames_stay_that_higher_temporal_layers_may_refer_to() -> None:
    kinds = [
        (REFERENCE, 0),
        (NON_REFERENCE, 0),
        (NON_REFERENCE, 1),
        (NON_REFERENCE, 2),
        (REFERENCE, 2),
    ]
    packets = [hevc_frame(nal_type, layer) for nal_type, layer in kinds]
    assert unreferenced_frames("hevc", packets, b"") == [False, False, False, True, False]
    assert unreferenced_frames("hevc", packets[:3], b"") == [False, False, True]
    assert unreferenced_frames("hevc", packets[:2], b"") == [False, True]


def test_a_frame_without_a_whole_header_stays() -> None:
    assert unreferenced_frames("hevc", [b"", b"\0\0\1", b"\0\0\1\2"], b"") == [False] * 3
