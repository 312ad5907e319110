"""How many denoiser passes blocks take: a distribution, as measured or with a given mean."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import inf

import numpy as np

METRIC = "vllm:twotower_denoising_steps_per_block"
_BUCKET = re.compile(rf"^{METRIC}_bucket\{{(?:.*,)?le=\"([^\"]+)\".*\}}\s+(\S+)")


@dataclass(frozen=True)
class StepsPerBlock:
    """``probabilities[i]`` of ``passes[i]`` denoiser passes for a block."""

    passes: tuple[int, ...]
    probabilities: tuple[float, ...]

    @classmethod
    def of_mean(cls, mean: float) -> StepsPerBlock:
        """The narrowest distribution with this mean: the whole numbers below and above it."""
        if not mean >= 1:
            raise ValueError("a block takes at least 1 pass")
        low = int(mean)
        share = mean - low
        return cls((low, low + 1), (1 - share, share)) if share else cls((low,), (1.0,))

    @classmethod
    def of_buckets(cls, buckets: Iterable[tuple[float, float]]) -> StepsPerBlock:
        """From a Prometheus histogram: pairs of upper bound and cumulative count, in order.

        A bucket's blocks are spread evenly over the whole numbers in it; those above the last finite bound count as
        the next one. Raises ValueError if there are no blocks.
        """
        counts: dict[int, float] = {}
        below, counted = 0, 0.0
        for bound, cumulative in buckets:
            upper = below + 1 if bound == inf else int(bound)
            if cumulative > counted:
                for passes in range(below + 1, upper + 1):
                    counts[passes] = (cumulative - counted) / (upper - below)
            below, counted = upper, cumulative
        if not counted:
            raise ValueError("no finished block in it")
        return cls(tuple(counts), tuple(count / counted for count in counts.values()))

    @classmethod
    def of_metrics(cls, text: str) -> StepsPerBlock:
        """From what ``/metrics`` returns; the engines of one server are added up. Raises ValueError without blocks."""
        cumulative: Counter[float] = Counter()
        for line in text.splitlines():
            if match := _BUCKET.match(line):
                cumulative[float(match[1])] += float(match[2])
        if not cumulative:
            raise ValueError(f"no line of {METRIC}_bucket")
        return cls.of_buckets(sorted(cumulative.items()))

    @property
    def mean(self) -> float:
        return float(np.dot(self.passes, self.probabilities))

    def sample(self, generator: np.random.Generator, size: int) -> np.ndarray:
        """(size,) numbers of passes."""
        return generator.choice(self.passes, size, p=self.probabilities)
