# SPDX-License-Identifier: Apache-2.0
"""Parameter sets of H.264 and HEVC that come inside a stream, beside those in front of it."""

from megatron_keye.data.bitstream.description import nal_units_in_front
from megatron_keye.data.bitstream.nal_units import PARAMETER_SET_TYPES, nal_type, nal_units_of
from megatron_keye.errors import UserError


class ParameterSets:
    """Follows a stream's parameter sets, packet by packet, from its first one on."""

    def __init__(self, codec: str, extradata: bytes) -> None:
        """Take the codec, by FFmpeg's name, and what stands in front of the stream."""
        self._codec, self._extradata = codec, extradata
        self._types = PARAMETER_SET_TYPES.get(codec, range(0))
        self._added: set[bytes] = set()
        self._front: set[bytes] = set()
        try:
            front = nal_units_in_front(codec, extradata) if self._types else []
        except UserError:
            return
        self._front = {unit for unit in front if nal_type(codec, unit) in self._types}

    def are_complete_at(self, packet: bytes) -> bool:
        """Take the next packet; return whether a decoder that begins there knows all so far.

        It knows those in front and in the packet itself.
        """
        if not self._types:
            return True
        own = set(nal_units_of(self._types, self._codec, packet, self._extradata))
        self._added |= own - self._front
        return self._added <= own
