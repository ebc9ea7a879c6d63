# SPDX-License-Identifier: Apache-2.0
"""A shuffled order that is computed position by position, so that it takes no memory.

A Feistel network over pairs (left, right) is a bijection for any mixing function; a result outside
the range is mapped again until it is inside (cycle walking), which leaves a bijection of the range
(Black and Rogaway, Ciphers with Arbitrary Finite Domains, CT-RSA 2002).
"""

import math

import numpy as np

_ROUNDS = 12
"""Four pass for random over large ranges (Luby and Rackoff, 1988), but of few samples a round
mixes few bits: all orders of five come equally often from 12 rounds on."""
_MASK = (1 << 64) - 1


class Permutation:
    """A bijection of the numbers from 0 to `size` - 1, determined by its size and key."""

    def __init__(self, size: int, key: tuple[int, ...]) -> None:
        """Derive the round keys.

        Args:
            size: Numbers to permute, 1 or more.
            key: Integers of 0 or more, of any size.
        """
        self._size = size
        # The smallest rectangle around `size` numbers; fewer than half of its cells are outside.
        self._num_left = math.isqrt(size - 1) + 1
        self._num_right = -(-size // self._num_left)
        words = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)
        self._round_keys = [int(word) for word in words]

    def __getitem__(self, position: int) -> int:
        """Return the number at a position.

        Args:
            position: From 0 to `size` - 1.
        """
        assert 0 <= position < self._size, f"position {position} of {self._size}"
        number = self._mix(position)
        while number >= self._size:
            number = self._mix(number)
        return number

    def _mix(self, number: int) -> int:
        """Permute the cells of the rectangle."""
        left, right = divmod(number, self._num_right)
        for round_number, key in enumerate(self._round_keys):
            if round_number % 2:
                right = (right + _hash(left ^ key)) % self._num_right
            else:
                left = (left + _hash(right ^ key)) % self._num_left
        return left * self._num_right + right


def _hash(word: int) -> int:
    """Return 64 well-mixed bits (splitmix64's output function, Steele et al., OOPSLA 2014)."""
    word = (word + 0x9E3779B97F4A7C15) & _MASK
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
    return word ^ (word >> 31)
