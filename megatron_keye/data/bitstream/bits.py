# SPDX-License-Identifier: Apache-2.0
"""Reads the fields of video headers, which begin at any bit."""

from megatron_keye.errors import UserError


class Bits:
    """Reads bits, most significant first; running past the end raises UserError."""

    def __init__(self, content: bytes) -> None:
        self._bits = "".join(f"{byte:08b}" for byte in content)
        self._position = 0

    def read_u(self, width: int) -> int:
        """Read an unsigned number of `width` bits, 0 where `width` is 0."""
        start, self._position = self._position, self._position + width
        if self._position > len(self._bits):
            raise UserError("its headers end early")
        return int("0" + self._bits[start : self._position], 2)

    def read_ue(self) -> int:
        """Read an unsigned Exp-Golomb number."""
        num_zeros = self._bits.find("1", self._position) - self._position
        if num_zeros < 0:
            raise UserError("its headers end early")
        self._position += num_zeros
        return self.read_u(num_zeros + 1) - 1

    def read_se(self) -> int:
        """Read a signed Exp-Golomb number: 0, 1, -1, 2, ..."""
        code = self.read_ue()
        return (code + 1) // 2 if code % 2 else -(code // 2)
