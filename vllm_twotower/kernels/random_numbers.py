"""Random numbers as a function of counters, so that they depend on nothing that happens to other requests."""

from __future__ import annotations

from torch import Tensor


def uniform(seed: Tensor, *counters: Tensor) -> Tensor:
    """Uniform numbers in [0, 1) that depend on the seed and the counters alone: a hash, not a stream.

    Arguments are integers and broadcast; the result is fp64. Each counter is mixed in with the finaliser of SplitMix64
    (Steele, Lea and Flood, OOPSLA 2014), in int64 arithmetic that wraps around.
    """
    state = _mix(seed.long())
    for counter in counters:
        state = _mix(state + counter.long() * -7046029254386353131)  # 0x9E3779B97F4A7C15
    return _logical_shift(state, 11).double() * 2.0**-53


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _logical_shift(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _logical_shift(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ _logical_shift(x, 31)
