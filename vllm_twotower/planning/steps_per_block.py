"""How many denoiser passes blocks take: a distribution, as measured or with a given mean."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from math import inf

import numpy as np

METRIC = "vllm:twotower_denoising_steps_per_block"
_BUCKET = re.compile(rf"^{METRIC}_bucket\{{(?:.*,)?le=\"([^\"]+)\".*\}}\s+(\S+)")
_SUM = re.compile(rf"^{METRIC}_sum\S*\s+(\S+)")


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
    def of_buckets(cls, buckets: Iterable[tuple[float, float]], total_passes: float) -> StepsPerBlock:
        """From a Prometheus histogram: pairs of upper bound and cumulative count, in order, and the sum.

        A bucket's blocks take the fewest or the most passes that fall into it, in such shares, the same for every
        bucket, that the mean is that of the sum. Blocks above the last finite bound count as one pass more than it.
        Raises ValueError if there are no blocks.
        """
        found: list[tuple[int, int, float]] = []
        below, counted = 0, 0.0
        for bound, cumulative in buckets:
            most = below + 1 if bound == inf else int(bound)
            if cumulative > counted:
                found.append((below + 1, most, cumulative - counted))
            below, counted = most, cumulative
        if not found:
            raise ValueError("no finished block in it")
        excess = sum(most * count for _, most, count in found) - total_passes
        width = sum((most - fewest) * count for fewest, most, count in found)
        share = min(1.0, max(0.0, excess / width)) if width else 0.0
        counts: defaultdict[int, float] = defaultdict(float)
        for fewest, most, count in found:
            counts[fewest] += count * share
            counts[most] += count * (1 - share)
        passes = sorted(value for value, count in counts.items() if count)
        return cls(tuple(passes), tuple(counts[value] / counted for value in passes))

    @classmethod
    def of_metrics(cls, text: str) -> StepsPerBlock:
        """From what ``/metrics`` returns; the engines of one server are added up. Raises ValueError without blocks."""
        cumulative: defaultdict[float, float] = defaultdict(float)
        total = 0.0
        for line in text.splitlines():
            if match := _BUCKET.match(line):
                cumulative[float(match[1])] += float(match[2])
            elif match := _SUM.match(line):
                total += float(match[1])
        if not cumulative:
            raise ValueError(f"no line of {METRIC}_bucket")
        return cls.of_buckets(sorted(cumulative.items()), total)

    @property
    def mean(self) -> float:
        return sum(p * passes for passes, p in zip(self.passes, self.probabilities, strict=True))

    def sample(self, generator: np.random.Generator, size: int) -> np.ndarray:
        """(size,) numbers of passes."""
        return generator.choice(self.passes, size, p=self.probabilities)
