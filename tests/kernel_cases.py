"""Calls of the Triton kernels beside those of their namesakes in torch, for the interpreter and for GPUs.

python kernel_cases.py prints, in Triton's interpreter, how far each result is from torch's, by kernel.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

import torch
from torch import Tensor

from vllm_twotower.kernels import modulated_norm, random_numbers, seeded_mamba, unmasking, vocabulary
from vllm_twotower.kernels.on_gpu import modulated_norm as modulated_norm_on_gpu
from vllm_twotower.kernels.on_gpu import random_numbers as random_numbers_on_gpu
from vllm_twotower.kernels.on_gpu import seeded_mamba as seeded_mamba_on_gpu
from vllm_twotower.kernels.on_gpu import unmasking as unmasking_on_gpu
from vllm_twotower.kernels.on_gpu import vocabulary as vocabulary_on_gpu

Results = tuple[Tensor, ...]
Calls = tuple[Callable[[], Results], Callable[[], Results]]
"""Of a kernel and of torch, on the same arguments."""
RELEASED = {"heads": 64, "channels": 64, "groups": 8, "size": 128}


class Random:
    """Tensors of one generator on a device."""

    def __init__(self, seed: int, device: str):
        self._generator, self._device = torch.Generator().manual_seed(seed), device

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=self._generator).to(self._device, dtype)

    def below(self, limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, shape, generator=self._generator).to(self._device)


def conv(
    random: Random, rows: int, positions: int, channels: int, dtype: torch.dtype = torch.float32, bias: bool = True
) -> Calls:
    """A cache whose dimensions lie the other way round, as vLLM's may, and a view of a wider projection."""
    xbc = random.normal(rows, positions, channels + 7, dtype=dtype)[..., :channels]
    states = random.normal(5, channels, 3, dtype=dtype).transpose(1, 2)
    indices, weight = random.below(5, rows), random.normal(channels, 4, dtype=dtype)
    offset = random.normal(channels, dtype=dtype) if bias else None
    return (
        lambda: (seeded_mamba_on_gpu.seeded_conv(xbc, states, indices, weight, offset),),
        lambda: (seeded_mamba.seeded_conv(xbc, states, indices, weight, offset),),
    )


def scan(
    random: Random,
    rows: int,
    positions: int,
    heads: int,
    channels: int,
    groups: int,
    size: int,
    dtype: torch.dtype = torch.float32,
) -> Calls:
    """Views of what a convolution gives, and decays up to what would overflow one factor."""
    x, dt, dt_bias, a, b, c = scanned(random, rows, positions, heads, channels, groups, size, dtype)
    states, indices, d = random.normal(5, heads, channels, size), random.below(5, rows), random.normal(heads)
    lengths = random.below(positions + 1, rows) if rows > 1 else None
    for row in range(0 if lengths is None else rows):
        x[row, lengths[row] :], b[row, lengths[row] :] = torch.nan, torch.nan

    def of(function: Callable[..., None]) -> Results:
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        function(x, dt, dt_bias, a, b, c, d, states, indices, out, lengths)
        return tuple(out[row, : None if lengths is None else lengths[row]] for row in range(rows))

    return lambda: of(seeded_mamba_on_gpu.seeded_scan), lambda: of(seeded_mamba.seeded_scan)


def scanned(
    random: Random, rows: int, positions: int, heads: int, channels: int, groups: int, size: int, dtype: torch.dtype
) -> Results:
    """x, dt, dt_bias, a, b and c."""
    mixed = random.normal(rows, positions, heads * channels + 2 * groups * size)
    x, b, c = mixed.split([heads * channels, groups * size, groups * size], -1)
    x, b, c = x.unflatten(-1, (heads, channels)), b.unflatten(-1, (groups, size)), c.unflatten(-1, (groups, size))
    # Of steps from 1e-9 to 30: as short as rounding allows, and beyond where softplus is the identity.
    dt = (8 * random.normal(rows, positions, heads + 3, dtype=dtype))[..., :heads]
    return x, dt, random.normal(heads, dtype=dtype), -2 * random.normal(heads).exp(), b, c


def commit(
    random: Random,
    rows: int,
    positions: int,
    heads: int,
    channels: int,
    groups: int,
    size: int,
    dtype: torch.dtype = torch.float32,
) -> Calls:
    """Rows of some positions, of none and of all; what is not read is NaN."""
    x, dt, dt_bias, a, b, _ = scanned(random, rows, positions, heads, channels, groups, size, dtype)
    xbc = random.normal(rows, positions, heads * channels + 5, dtype=dtype)[..., : heads * channels]
    counts = random.below(positions + 1, rows)
    counts[0], counts[-1] = 0, positions
    conv_states = random.normal(rows + 2, heads * channels, 3, dtype=dtype).transpose(1, 2)
    states, indices = random.normal(rows + 2, heads, channels, size), torch.arange(rows, device=x.device) + 1

    def of(function: Callable[..., None]) -> Results:
        of_conv, of_scan = conv_states.clone(memory_format=torch.preserve_format), states.clone()
        function(xbc, x, dt, dt_bias, a, b, counts, of_conv, of_scan, indices)
        return of_conv, of_scan

    return lambda: of(seeded_mamba_on_gpu.commit_states), lambda: of(seeded_mamba.commit_states)


def norm(
    random: Random,
    rows: int,
    positions: int,
    channels: int,
    before: bool,
    dtype: torch.dtype = torch.float32,
    is_first: bool = False,
    padding: bool = False,
) -> Calls:
    x, mixed = (random.normal(rows * positions, channels, dtype=dtype) for _ in range(2))
    shift, scale, gate = random.normal(rows, 3, channels, dtype=dtype).unbind(1)
    if is_first:
        mixed = gate = None
    is_padding = random.below(2, rows * positions) > 0 if padding else None
    arguments = (x, mixed, gate, shift, scale, random.normal(channels, dtype=dtype), 1e-5, before, is_padding)
    return (
        lambda: modulated_norm_on_gpu.gated_residual_norm(*arguments),
        lambda: modulated_norm.gated_residual_norm(*arguments),
    )


def statistics(random: Random, rows: int, size: int, never: int | None, dtype: torch.dtype = torch.float32) -> Calls:
    """Equal largest logits, a row of impossible tokens but one, and one with NaN."""
    logits = 4 * random.normal(rows, size, dtype=dtype)
    logits[0, [size // 3, size - 1]] = 40
    if never is not None:
        logits[:, never] = 50
    if rows > 2:
        logits[1] = -torch.inf
        logits[1, size // 2] = 1
        logits[2, size // 2] = torch.nan

    def of(function: Callable[..., Results]) -> Results:
        *plain, nothing = function(logits, never)
        *others, second = function(logits, never, True)
        assert not len(nothing)
        is_finite = plain[2].isfinite()
        # Beside the only possible token of a row there is no second one.
        found = (*plain, *others, second.clamp(min=-1e9))
        return *(values[is_finite] for values in found), is_finite

    return lambda: of(vocabulary_on_gpu.row_statistics), lambda: of(vocabulary.row_statistics)


def draw(random: Random, rows: int, size: int, never: int | None, dtype: torch.dtype = torch.float32) -> Calls:
    """Targets from none of the mass to nearly all of it; a token that never is would have most of it."""
    logits = 2 * random.normal(rows, size, dtype=dtype)
    temperature, largest = (random.below(20, rows) + 1) / 10, logits.float().amax(1)
    if never is not None:
        logits[:, never] = 50

    def of(module: ModuleType) -> Results:
        parts = module.masses(logits, largest, temperature, never)
        total = parts.sum(1)
        target = total * torch.linspace(0, 1 - 1e-9, rows, dtype=torch.float64, device=total.device)
        return total.float(), *module.drawn(logits, parts, largest, temperature, target, never)

    return lambda: of(vocabulary_on_gpu), lambda: of(vocabulary)


def numbers(random: Random, rows: int, num_counters: int) -> Calls:
    """Seeds of 63 bits, counters of few and of many."""
    seed = random.below(2**62, rows)
    counters = [random.below(2 ** (8 * i + 1), rows) for i in range(num_counters)]
    return (
        lambda: (random_numbers_on_gpu.uniform(seed, *counters),),
        lambda: (random_numbers.uniform(seed, *counters),),
    )


def unmask(random: Random, rows: int, positions: int) -> Calls:
    """Few values, so that many are equal; among the rows whole ones, and some in their last pass."""
    confidence = random.below(8, rows, positions) / 8
    masked = random.below(3, rows, positions) > 0
    masked[0] = False
    step, steps = random.below(5, rows), 1 + random.below(8, rows)
    arguments = (confidence, masked, random.below(8, rows) / 8, step, steps)
    return (
        lambda: (unmasking_on_gpu.most_confident(*arguments),),
        lambda: (unmasking.most_confident(*arguments),),
    )


BF16 = torch.bfloat16
CASES: dict[str, list[tuple[Callable[..., Calls], dict[str, Any]]]] = {
    "conv": [
        (conv, {"rows": 3, "positions": 16, "channels": 96}),
        (conv, {"rows": 1, "positions": 9, "channels": 70, "bias": False}),
        (conv, {"rows": 2, "positions": 1, "channels": 6}),
        (conv, {"rows": 2, "positions": 16, "channels": 6144, "dtype": BF16}),
    ],
    "scan": [
        (scan, {"rows": 3, "positions": 16, "heads": 12, "channels": 32, "groups": 2, "size": 32}),
        (scan, {"rows": 1, "positions": 9, "heads": 3, "channels": 8, "groups": 1, "size": 6}),
        (scan, {"rows": 2, "positions": 1, "heads": 4, "channels": 40, "groups": 2, "size": 24}),
        (scan, {"rows": 1, "positions": 16, **RELEASED}),
        (scan, {"rows": 1, "positions": 16, **RELEASED, "dtype": BF16}),
    ],
    "commit": [
        (commit, {"rows": 3, "positions": 16, "heads": 12, "channels": 32, "groups": 2, "size": 32}),
        (commit, {"rows": 2, "positions": 9, "heads": 3, "channels": 8, "groups": 1, "size": 6}),
        (commit, {"rows": 2, "positions": 1, "heads": 4, "channels": 40, "groups": 2, "size": 24}),
        (commit, {"rows": 2, "positions": 16, **RELEASED}),
        (commit, {"rows": 1, "positions": 16, **RELEASED, "dtype": BF16}),
    ],
    "norm": [
        (norm, {"rows": 3, "positions": 16, "channels": 192, "before": True}),
        (norm, {"rows": 1, "positions": 9, "channels": 70, "before": False, "is_first": True}),
        (norm, {"rows": 3, "positions": 5, "channels": 70, "before": True, "padding": True}),
        (norm, {"rows": 2, "positions": 16, "channels": 2688, "before": False}),
        (norm, {"rows": 2, "positions": 16, "channels": 2688, "before": True, "dtype": BF16}),
    ],
    "statistics": [
        (statistics, {"rows": 5, "size": 320, "never": 3}),
        (statistics, {"rows": 3, "size": 4097, "never": None}),
        (statistics, {"rows": 4, "size": 131072, "never": 131071}),
        (statistics, {"rows": 3, "size": 9001, "never": 0, "dtype": BF16}),
    ],
    "draw": [
        (draw, {"rows": 5, "size": 320, "never": 3}),
        (draw, {"rows": 1, "size": 4097, "never": None}),
        (draw, {"rows": 12, "size": 131072, "never": 131071}),
        (draw, {"rows": 7, "size": 9001, "never": 0, "dtype": BF16}),
    ],
    "uniform": [
        (numbers, {"rows": 1, "num_counters": 3}),
        (numbers, {"rows": 1000, "num_counters": 3}),
        (numbers, {"rows": 130, "num_counters": 4}),
    ],
    "unmask": [
        (unmask, {"rows": 40, "positions": 16}),
        (unmask, {"rows": 9, "positions": 7}),
        (unmask, {"rows": 1, "positions": 1}),
    ],
}


def calls(kernel: str, device: str = "cpu") -> Iterator[Calls]:
    """The calls of a kernel's cases."""
    for seed, (make, arguments) in enumerate(CASES[kernel]):
        yield make(Random(seed, device), **arguments)


def error(got: Results, want: Results) -> float:
    """The largest difference, of floats relative to the largest value; infinite if anything else differs."""
    worst = 0.0
    for mine, its in zip(got, want, strict=True):
        if mine.shape != its.shape or mine.dtype != its.dtype:
            return float("inf")
        if not its.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(mine, its) else float("inf"))
        elif its.numel():
            difference = (mine.float() - its.float()).abs().max() / its.float().abs().max().clamp(min=1)
            worst = max(worst, difference.nan_to_num(nan=float("inf")).item())
    return worst


if __name__ == "__main__":
    print(json.dumps({kernel: [error(mine(), its()) for mine, its in calls(kernel)] for kernel in CASES}))
