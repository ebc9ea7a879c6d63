# SPDX-License-Identifier: Apache-2.0
"""What the packets of a stream state, in stored order, and where decoding can begin."""

import zlib
from dataclasses import dataclass

import av
from av.video.stream import VideoStream

from megatron_keye.data.bitstream.keyframes import can_check, recovery_frames
from megatron_keye.data.bitstream.nal_units import is_h264_reference, is_random_access_point
from megatron_keye.data.bitstream.parameter_sets import ParameterSets


@dataclass(kw_only=True)
class Candidate:
    """A packet where decoding can begin, if the order of frames allows it."""

    packet: int
    """Its number."""
    exact_packet: int
    """Number of the first packet whose frame is exact; -1 until it comes."""
    num_missing: int
    """Reference frames until then."""
    is_reset: bool
    """Whether it is a random access point, which the order of frames has to respect."""
    anchor: tuple[int, int]
    """Number of the last packet, up to this one, whose place is known, and that place in bytes."""
    timestamp: int
    """Time of its frame."""
    decode_timestamp: int
    """When it is to be decoded."""
    checksum: int
    """CRC-32."""


class PacketList:
    """Grows packet by packet; what is read is what can't be read later without reading all."""

    def __init__(self, stream: VideoStream) -> None:
        codec = stream.codec_context.codec
        self.codec = codec.canonical_name
        """FFmpeg's name of the codec."""
        self.sizes: list[int] = []
        """Bytes of each packet."""
        self.timestamps: list[int | None] = []
        """Time of each packet's frame, None where the container states none."""
        self.decode_timestamps: list[int | None] = []
        """When each packet is to be decoded."""
        self.are_shown: list[bool] = []
        """Whether a packet's frame is shown."""
        self.are_whole = True
        """Whether the container calls no packet cut or damaged."""
        self.candidates: list[Candidate] = []
        """Where decoding may begin."""
        self._extradata = bytes(stream.codec_context.extradata or b"")
        self._parameter_sets = ParameterSets(self.codec, self._extradata)
        self._is_intra_only = codec.intra_only
        self._has_new_extradata = False
        self._anchor = -1, -1

    def add(self, packet: "av.Packet[VideoStream]") -> bytes:
        """Add the next packet and return its content."""
        content = bytes(packet)
        number = len(self.sizes)
        if packet.pos is not None:
            self._anchor = number, packet.pos
        self.sizes.append(packet.size)
        self.are_whole &= not packet.is_corrupt
        self.timestamps.append(packet.pts)
        self.decode_timestamps.append(packet.dts)
        # Packets flagged "discard" lie outside the edit list: decoded, but never shown.
        self.are_shown.append(not (packet.is_discard or self._is_hidden(content)))
        if packet.has_sidedata("new_extradata"):
            announced = bytes(packet.get_sidedata("new_extradata"))
            self._has_new_extradata |= announced != self._extradata
        self._follow_refresh(number, content)
        are_known = self._parameter_sets.are_complete_at(content) and not self._has_new_extradata
        if are_known and packet.pts is not None and (packet.is_keyframe or number == 0):
            self._add_candidate(number, packet.pts, packet.dts, content)
        return content

    def _add_candidate(
        self, number: int, timestamp: int, decode_timestamp: int | None, content: bytes
    ) -> None:
        num_missing = 0 if self._is_intra_only else self._recovery_frames(number, content)
        if num_missing is None:
            return
        self.candidates.append(
            Candidate(
                packet=number,
                exact_packet=-1 if num_missing else number,
                num_missing=num_missing,
                is_reset=is_random_access_point(self.codec, content, self._extradata),
                anchor=self._anchor,
                timestamp=timestamp,
                decode_timestamp=timestamp if decode_timestamp is None else decode_timestamp,
                checksum=zlib.crc32(content),
            )
        )

    def _recovery_frames(self, number: int, content: bytes) -> int | None:
        """Return after how many reference frames decoding from here is exact, None for never."""
        found = recovery_frames(self.codec, content, self._extradata)
        # What can't be told of a codec's keyframes is not needed of its first packet.
        return 0 if number == 0 and found is None and not can_check(self.codec) else found

    def _follow_refresh(self, number: int, content: bytes) -> None:
        """Count reference frames while H.264 refreshes its picture."""
        refreshing = [c for c in self.candidates[-2:] if c.exact_packet < 0]
        if refreshing and is_h264_reference(content, self._extradata):
            for candidate in refreshing:
                candidate.num_missing -= 1
                if candidate.num_missing == 0:
                    candidate.exact_packet = number

    def _is_hidden(self, content: bytes) -> bool:
        """Return whether a packet is VP8's alternate reference frame, which is never shown."""
        return self.codec == "vp8" and not content[0] & 0x10
