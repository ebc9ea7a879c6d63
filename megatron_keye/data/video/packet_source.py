# SPDX-License-Identifier: Apache-2.0
"""The packets of a video by number, read from an entry point on.

Where a seek lands is a promise of the container alone, and some land late. The packet that comes
back must therefore be the very one that was probed, else the file is read from the top.
"""

import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain, islice

import av
from av.container import InputContainer
from av.video.stream import VideoStream

from megatron_keye.data.video.container import opened_video
from megatron_keye.data.video.video_info import VideoInfo
from megatron_keye.errors import UserError

type _Packets = "Iterator[av.Packet[VideoStream]]"

_SEEK_BY_BYTE = ("mpeg", "mpegts")
"""Containers without an index: a search by time reads a lot, and times may be guesses."""


@contextmanager
def opened_packets(info: VideoInfo) -> Iterator["PacketSource"]:
    """Open a video that was probed.

    Raises:
        UserError: Naming the file that cannot be read.
    """
    with ExitStack() as stack:
        source = PacketSource(info, stack)
        yield source


class PacketSource:
    """An open video."""

    def __init__(self, info: VideoInfo, stack: ExitStack) -> None:
        self._info, self._entries, self._stack = info, info.entries, stack
        self._container: InputContainer
        self.stream: VideoStream
        """The video stream; another object once the file had to be read from the top."""
        self._reopen()

    def read(self, entry: int) -> "Iterator[tuple[int, av.Packet[VideoStream]]]":
        """Yield (number, packet) from an entry point on, with the times that were probed.

        Raises:
            UserError: Naming the file, when it no longer holds the packets that were probed.
        """
        sizes = self._info.packet_sizes
        number = int(self._entries.packets[entry])
        found = self._sought(entry) if number else None
        for packet in found or ():
            if number == len(sizes) or packet.size != sizes[number]:
                break
            yield number, self._timed(packet, number)
            number += 1
        if number < len(sizes):
            yield from self._read_from_top(number)

    def _read_from_top(self, first: int) -> "Iterator[tuple[int, av.Packet[VideoStream]]]":
        """Yield all packets from number `first` on, without any seek."""
        self._reopen()
        sizes = self._info.packet_sizes
        number = 0
        for packet in _with_content(self._container, self.stream):
            if number == len(sizes) or packet.size != sizes[number]:
                break
            if number >= first:
                yield number, self._timed(packet, number)
            number += 1
        if number < len(sizes):
            raise UserError(
                f"{self._info.path}: packet {number} is no longer what it was, expected the file "
                "that was probed, read by the same version of FFmpeg; restore it, or prepare again"
            )

    def _sought(self, entry: int) -> _Packets | None:
        """Seek to an entry point; return the packets from it on, None if no seek finds it."""
        if self._container.format.name in _SEEK_BY_BYTE:
            return self._sought_by_byte(entry)
        times = self._entries.timestamps[entry], self._entries.decode_timestamps[entry]
        for time in dict.fromkeys(map(int, times)):
            for packets in self._after_seek(time):
                for packet in packets:
                    if self._is_at(packet, entry) and self._is_entry(packet, entry):
                        return chain([packet], packets)
                    if self._is_behind(packet, entry):
                        break
        return None

    def _sought_by_byte(self, entry: int) -> _Packets | None:
        """Seek to the last packet in front of an entry point that has a place of its own."""
        sizes = self._info.packet_sizes
        number, anchor = self._entries.packets[entry], self._entries.anchors[entry]
        # Frames of equal size can't be told apart without a place.
        if anchor < 0 or (sizes[anchor:number] == sizes[number]).any():
            return None
        position = int(self._entries.positions[entry])
        for packets in self._after_seek(position, is_position=True):
            # The end of another frame may come first.
            for place, packet in enumerate(islice(packets, int(number - anchor) + 2)):
                if place == 0 and packet.pos != position:
                    return None
                if self._is_entry(packet, entry):
                    return chain([packet], packets)
        return None

    def _after_seek(self, target: int, *, is_position: bool = False) -> Iterator[_Packets]:
        """Yield the packets that come after a seek, or nothing where the container can't seek."""
        try:
            self._container.seek(target, stream=self.stream, unsupported_byte_offset=is_position)
        except av.FFmpegError:
            return
        yield _with_content(self._container, self.stream)

    def _is_at(self, packet: "av.Packet[VideoStream]", entry: int) -> bool:
        """Return whether a packet is where an entry point is, by its place or else its time."""
        if self._has_place(entry):
            return bool(packet.pos == self._entries.positions[entry])
        return bool(packet.pts == self._entries.timestamps[entry])

    def _is_entry(self, packet: "av.Packet[VideoStream]", entry: int) -> bool:
        """Return whether a packet has the content that was probed at an entry point."""
        if packet.size != self._info.packet_sizes[self._entries.packets[entry]]:
            return False
        return bool(zlib.crc32(bytes(packet)) == self._entries.checksums[entry])

    def _is_behind(self, packet: "av.Packet[VideoStream]", entry: int) -> bool:
        """Return whether a packet is stored behind an entry point, as far as can be told."""
        if self._has_place(entry) and packet.pos is not None:
            return bool(packet.pos > self._entries.positions[entry])
        return packet.pts is not None and bool(packet.pts > self._entries.timestamps[entry])

    def _has_place(self, entry: int) -> bool:
        """Return whether the container says where the packet of an entry point begins."""
        return bool(self._entries.anchors[entry] == self._entries.packets[entry])

    def _timed(self, packet: "av.Packet[VideoStream]", number: int) -> "av.Packet[VideoStream]":
        """Give a packet the time that was probed: in some containers times are guesses."""
        frame = self._info.packet_frames[number]
        if frame >= 0:
            packet.pts = int(self._info.timestamps[frame])
        return packet

    def _reopen(self) -> None:
        self._stack.close()
        self._container, self.stream = self._stack.enter_context(opened_video(self._info.path))


def _with_content(container: InputContainer, stream: VideoStream) -> _Packets:
    """Yield the packets of a stream but the empty one at its end."""
    return (packet for packet in container.demux(stream) if packet.size)
