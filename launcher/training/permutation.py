"""Permutations that need no memory: any part of one is computed alone."""

import numpy as np

from shardlaunch.launcher.seeding import sample_seeds

# A few whole permutations tell six rounds from chance, and several permutations ask for more (Patarin, Generic Attacks
# on Feistel Schemes, 2001); a run takes one per epoch.
MIN_ROUNDS = 8
# Two values that agree in one part keep their difference in the other, and do so after the next round of this one with
# probability 2 ** -bits. So small parts need more rounds; then pairs are as by chance within 2 ** (-48 / 2).
ROUND_BITS = 48

# The finalizer of MurmurHash3 (Appleby, public domain), whose last shift is left to those who use its upper bits.
_SHIFTS = np.uint32(16), np.uint32(13)
_FACTORS = np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)
_WORD = np.uint64(32)


class Permutation:
    """A permutation of range(size) that a key selects: a Feistel network with cycle walking, in integer arithmetic.

    A value has a lower part of half the bits, and an upper part below `_upper`. A round changes one part by a hash of
    the other: the lower by exclusive or, the upper by addition modulo `_upper`. So the network permutes a range that is
    less than one lower part longer than `size`; values outside are permuted again until they are inside (Black and
    Rogaway, Ciphers with Arbitrary Finite Domains, 2002).
    """

    def __init__(self, size: int, key: int) -> None:
        assert 1 <= size <= 1 << 62, "parts have 32 bits"
        self._size = size
        bits = self._bits = max(1, (size - 1).bit_length() // 2)
        self._mask = (1 << bits) - 1
        self._upper = (size + self._mask) >> bits
        self._keys = sample_seeds(key, 0, np.arange(num_rounds(size))).astype(np.uint32)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Return the values at positions, which are integers below `size`: int64."""
        values = self._network(positions.astype(np.int64))
        while len(outside := np.flatnonzero(values >= self._size)):
            values[outside] = self._network(values[outside])
        return values

    def _network(self, values: np.ndarray) -> np.ndarray:
        shift, num_upper, factor = np.uint32(32 - self._bits), np.uint32(self._upper), np.uint64(self._upper)
        lower = (values & self._mask).astype(np.uint32)
        upper = (values >> self._bits).astype(np.uint32)
        for key_of_lower, key_of_upper in zip(self._keys[::2], self._keys[1::2], strict=True):
            lower ^= _hashes(upper, key_of_lower) >> shift
            wide = _hashes(lower, key_of_upper).astype(np.uint64)
            wide *= factor
            wide >>= _WORD  # from all of 32 bits to numbers below `_upper`
            upper += wide.astype(np.uint32)
            np.minimum(upper, upper - num_upper, out=upper)  # what is below wraps to a large number, and stays
        found = upper.astype(np.int64)
        found <<= self._bits
        found |= lower
        return found


def num_rounds(size: int) -> int:
    """Return the number of rounds for a size: even, more for small ones."""
    bits = max(1, (size - 1).bit_length() // 2)
    return max(MIN_ROUNDS, 2 * -(-ROUND_BITS // (2 * bits)))


def _hashes(values: np.ndarray, key: np.uint32) -> np.ndarray:
    found = values + key
    for shift, factor in zip(_SHIFTS, _FACTORS, strict=True):
        found ^= found >> shift
        found *= factor
    return found
