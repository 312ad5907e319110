"""How many tokens of a draft the context tower accepts, as a distribution."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .steps_per_block import StepsPerBlock


@dataclass(frozen=True)
class AcceptedTokens:
    """Of all drafts the share ``shares[n]`` has n tokens accepted; a draft gives its request one token more."""

    shares: tuple[float, ...]

    @classmethod
    def of_mean(cls, mean: float, most: int) -> AcceptedTokens:
        """Drafts of ``most`` tokens, each right with the same probability as long as those before it are.

        Raises ValueError for a mean that is not in 0 ... ``most``.
        """
        if not 0 <= mean <= most:
            raise ValueError(f"a mean of {mean:g} accepted tokens does not lie in 0 ... {most}")
        tokens = np.arange(1, most + 1)
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if (middle**tokens).sum() < mean else (low, middle)
        at_least = np.append(high ** np.arange(most + 1), 0.0)
        return cls(tuple(at_least[:-1] - at_least[1:]))

    @property
    def mean(self) -> float:
        return float(np.dot(self.shares, np.arange(len(self.shares))))

    @property
    def excess(self) -> float:
        """Tokens that the last draft of a long text gives beyond its end, on average (renewal theory)."""
        given = 1 + np.arange(len(self.shares))
        return float(np.dot(self.shares, given * (given - 1)) / 2 / np.dot(self.shares, given))

    def sample(self, random: np.random.Generator, count: int) -> np.ndarray:
        """Accepted tokens of so many drafts (count,)."""
        shares = np.array(self.shares)
        return random.choice(len(shares), count, p=shares / shares.sum())


def expected_accepted(steps_per_block: StepsPerBlock, most: int) -> AcceptedTokens:
    """As many tokens of a draft as a denoiser pass commits on average. An assumption: nobody has measured it."""
    return AcceptedTokens.of_mean(min(most, (most + 1) / steps_per_block.mean), most)
