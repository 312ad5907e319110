"""Fitting a hardware's figures to measured seconds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations
from math import inf

import numpy as np

from .cost_model import PassCost
from .hardware import Hardware

_OVERHEADS = ("seconds_per_step", "seconds_per_context_pass", "seconds_per_denoiser_pass", "seconds_per_row")


def work(hardware: Hardware, num_steps: float, passes: Iterable[tuple[PassCost, float]]) -> np.ndarray:
    """What was done, (6,): steps, context passes, denoiser passes, rows of passes, bytes, FLOPs.

    ``passes`` are pairs of a pass and how many of it there were. Where memory traffic and arithmetic hide each other,
    a pass counts with the one that takes longer on ``hardware``.
    """
    total = np.array([num_steps, 0, 0, 0, 0, 0], dtype=float)
    for cost, count in passes:
        is_context = cost.tower == "context"
        memory, flops = cost.memory_bytes, cost.flops
        if hardware.overlaps:
            memory_bound = memory / hardware.memory_bandwidth >= flops / hardware.flops
            memory, flops = (memory, 0.0) if memory_bound else (0.0, flops)
        total += count * np.array([0, is_context, not is_context, cost.rows, memory, flops])
    return total


class HardwareFit:
    """Least squares for the four overheads, the bandwidth and the FLOP rate of a hardware, none of them negative.

    The seconds of any stretch of work are a sum of what was done (see :func:`work`) times one coefficient each: linear
    in the coefficients, although the bytes of a pass are not linear in its tokens. So the normal equations, 6 x 6, are
    all that has to be kept: measurements can be added one by one while an engine runs, and old ones forgotten. Errors
    count relative to the measured seconds; otherwise the largest batches would decide alone.

    ``prior`` is where a coefficient stays that the measurements say nothing about. ``prior_weight`` is how many
    measurements it is worth, in units of the share of the time that the coefficient explains in the measurements.
    """

    def __init__(self, prior: Hardware, prior_weight: float = 1e-3):
        self._prior = prior
        self._prior_weight = prior_weight
        self._gram = np.zeros((6, 6))
        self._moment = np.zeros(6)
        self._count = 0.0

    def add(self, work: np.ndarray, seconds: float, forget: float = 0.0) -> None:
        """One measurement: ``seconds``, without those spent on links, for ``work``.

        All measurements before it lose the share ``forget`` of their weight.
        """
        if seconds <= 0:
            raise ValueError(f"a measurement of {seconds} seconds")
        relative = work / seconds
        keep = 1 - forget
        self._gram = keep * self._gram + np.outer(relative, relative)
        self._moment = keep * self._moment + relative
        self._count = keep * self._count + 1

    def __add__(self, other: HardwareFit) -> HardwareFit:
        """The fit to the measurements of both, which may have forgotten theirs at different rates."""
        both = HardwareFit(self._prior, self._prior_weight)
        both._gram, both._moment = self._gram + other._gram, self._moment + other._moment
        both._count = self._count + other._count
        return both

    def hardware(self) -> Hardware:
        """The prior with fitted figures; a bandwidth or FLOP rate is infinite if its coefficient is 0.

        A cost that never occurred in the measurements keeps the prior's figure.
        """
        prior = self._prior
        start = np.array([*(getattr(prior, name) for name in _OVERHEADS), 1 / prior.memory_bandwidth, 1 / prior.flops])
        seen = np.diag(self._gram) > 0
        if not seen.any():
            return prior
        # In units in which every column of the measurements has length 1, the problem is well scaled.
        scale = np.sqrt(np.diag(self._gram)[seen])
        weight = self._prior_weight / self._count
        gram = self._gram[np.ix_(seen, seen)] / np.outer(scale, scale) + weight * np.eye(len(scale))
        moment = self._moment[seen] / scale + weight * start[seen] * scale
        fitted = start.copy()
        fitted[seen] = _non_negative_solution(gram, moment) / scale
        overheads, (per_byte, per_flop) = fitted[:4].tolist(), fitted[4:].tolist()
        return replace(
            prior,
            name=f"{prior.name} (fitted)",
            source=f"fitted to measurements, from {prior.name}",
            memory_bandwidth=1 / per_byte if per_byte else inf,
            flops=1 / per_flop if per_flop else inf,
            **dict(zip(_OVERHEADS, overheads, strict=True)),
        )


def _non_negative_solution(gram: np.ndarray, moment: np.ndarray) -> np.ndarray:
    """Minimises x' gram x / 2 - moment' x over x >= 0, (n,).

    Tries sets of positive coefficients, large ones first, until one meets the conditions of the minimum: no coefficient
    is negative, and the value falls along none of those that are 0.
    """
    everything = range(len(moment))
    for size in range(len(moment), 0, -1):
        for chosen in combinations(everything, size):
            solution = np.zeros(len(moment))
            support = list(chosen)
            solution[support] = np.linalg.solve(gram[np.ix_(support, support)], moment[support])
            slope = gram @ solution - moment
            if (solution >= 0).all() and (np.delete(slope, support) >= -1e-12).all():
                return solution
    return np.zeros(len(moment))
