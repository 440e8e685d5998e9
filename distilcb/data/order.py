"""Which samples make up which step: pure functions of the seed and the position, with no state to save.

A stored permutation of 64 million rows would cost 512 MB on every rank, and no library promises that its random
streams stay the same across versions. So the order is a keyed permutation computed by index (a Feistel network).
"""

from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """64 bits that look random for each input: a bijection, the same on every machine.

    Source: the finaliser of SplitMix64 (Steele, Lea and Flood 2014), Stafford's variant 13.
    """
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@lru_cache(maxsize=8192)  # a batch from a hundred languages needs eight for each, the same ones as the batch before
def key(*parts: int) -> np.uint64:
    """One 64-bit key from several whole numbers; their order matters."""
    state = np.zeros(1, dtype=np.uint64)
    for part in parts:
        state = mix(state * _GOLDEN + np.array([part & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64) + _GOLDEN)
    return np.uint64(state[0])


def permute(positions: NDArray[np.int64], size: int, permutation_key: np.uint64) -> NDArray[np.int64]:
    """Where a keyed permutation of range(size) sends each position.

    Args:
        positions: any shape, each in 0..size-1.
        size: at least 1.
        permutation_key: from `key`.

    Source: balanced Feistel network with cycle walking (Black and Rogaway 2002, "Ciphers with arbitrary finite
    domains").
    """
    half_bits = max(1, (int(size - 1).bit_length() + 1) // 2)
    values = positions.astype(np.uint64).ravel()
    pending = np.arange(values.size)
    while pending.size:  # the network permutes a power of 4 below 4 x size; walk on until back inside
        values[pending] = _feistel(values[pending], half_bits, permutation_key)
        pending = pending[values[pending] >= np.uint64(size)]
    return values.astype(np.int64).reshape(positions.shape)


def _feistel(values: NDArray[np.uint64], half_bits: int, permutation_key: np.uint64) -> NDArray[np.uint64]:
    shift, low = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & low
    for round_ in range(_ROUNDS):
        round_key = key(int(permutation_key), round_)
        left, right = right, left ^ (mix(right + round_key) & low)
    return (left << shift) | right


class SampleOrder(Protocol):
    """Which sample each position of a run shows, in arrays of any shape.

    size: positions after which as many blocks have been shown as there are.
    """

    size: int

    def epoch(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """How often the sample of each position had been shown before, from 0."""

    def row(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The row of the store that each position shows."""


class Order:
    """The order in which a run sees its samples; epoch e is positions e*size .. (e+1)*size - 1."""

    def __init__(self, rows: int, *, seed: int, fraction: float = 1.0) -> None:
        """rows: blocks in the store; fraction: the share of them that is used, drawn once from the seed."""
        self.rows, self.seed = rows, seed
        self.size = max(1, round(rows * fraction))

    def epoch(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The epoch of each position, from 0."""
        return positions // self.size

    def row(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The row of the store that each position of the run shows."""
        rows = np.empty_like(positions)
        epochs = self.epoch(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = permute(positions[here] % self.size, self.size, key(self.seed, int(epoch), _EPOCH))
        if self.size < self.rows:
            rows = permute(rows, self.rows, key(self.seed, 0, _FRACTION))
        return rows


# Purposes, so that streams made from one seed never coincide.
_EPOCH, _FRACTION = 1, 2
