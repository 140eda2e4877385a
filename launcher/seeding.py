"""The two random streams: seeds derived from the run's position, so that no generator state must be saved."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch
import xxhash

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15

# The same constants for arrays, built once: building numpy scalars takes longer than a micro-batch's arithmetic.
_ARRAY_GOLDEN = np.uint64(_GOLDEN)
_ARRAY_ROUNDS = (
    (np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)),
    (np.uint64(27), np.uint64(0x94D049BB133111EB)),
)
_ARRAY_LAST_SHIFT, _ARRAY_ONE = np.uint64(31), np.uint64(1)


def _mix(x: int) -> int:
    """Scatter 64 bits (the finalizer of splitmix64: Steele, Lea, Flood 2014)."""
    x = (x + _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on every part and on their order."""
    seed = 0
    for part in parts:
        number = xxhash.xxh3_64_intdigest(part.encode()) if isinstance(part, str) else part & _MASK
        seed = _mix(seed ^ _mix(number))
    return seed >> 1


def seed_generators(value: int) -> None:
    """Seed the global generators of torch (CPU), numpy and Python, which user code draws from.

    The generators are seeded directly: torch.manual_seed visits every device and takes a hundred times as long.
    """
    torch.default_generator.manual_seed(value)
    np.random.seed(value & 0xFFFFFFFF)
    random.seed(value)


def seed_model_stream(seed: int, step: int, micro_batch: int, device: torch.device) -> None:
    """Seed the generators that the model draws from (dropout) for one micro-batch."""
    value = derive_seed(seed, step, micro_batch)
    seed_generators(value)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(value)


@contextmanager
def seeded(value: int) -> Iterator[None]:
    """Seed the global generators of torch (CPU), numpy and Python, and restore them afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed_generators(value)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def sample_seeds(seed: int, epoch: int, samples: np.ndarray) -> np.ndarray:
    """Return one 63-bit seed per sample for random preprocessing: int64, shaped like `samples` (their indices)."""
    x = samples.astype(np.uint64)
    x *= _ARRAY_GOLDEN
    x += _sample_base(seed, epoch)
    for shift, factor in _ARRAY_ROUNDS:
        x ^= x >> shift
        x *= factor
    x ^= x >> _ARRAY_LAST_SHIFT
    x >>= _ARRAY_ONE
    return x.view(np.int64)


@lru_cache(maxsize=4)
def _sample_base(seed: int, epoch: int) -> np.uint64:
    return np.uint64(derive_seed(seed, "samples", epoch))
