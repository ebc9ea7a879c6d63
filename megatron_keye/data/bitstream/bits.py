"""Reads the fields of video headers, which begin at any bit."""

from megatron_keye.errors import UserError

ENDS_EARLY = "its headers end early"


class Bits:
    """Reads bits, most significant first; running past the end raises UserError."""

    def __init__(self, content: bytes) -> None:
        self.bits = "".join(f"{byte:08b}" for byte in content)
        self.place = 0

    def number(self, width: int) -> int:
        """Read an unsigned number of `width` bits, of which there may be none."""
        if self.place + width > len(self.bits):
            raise UserError(ENDS_EARLY)
        self.place += width
        return int("0" + self.bits[self.place - width : self.place], 2)

    def golomb(self) -> int:
        """Read an unsigned Exp-Golomb number."""
        zeros = self.bits.find("1", self.place) - self.place
        if zeros < 0:
            raise UserError(ENDS_EARLY)
        self.place += zeros
        return self.number(zeros + 1) - 1

    def signed_golomb(self) -> int:
        """Read a signed Exp-Golomb number: 0, 1, -1, 2, ..."""
        code = self.golomb()
        return (code + 1) // 2 if code % 2 else -(code // 2)
