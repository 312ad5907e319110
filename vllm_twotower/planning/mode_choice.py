"""Which mode a new request gets: the one the cost model expects to be faster at the present load."""

from __future__ import annotations

from dataclasses import dataclass

from .cost_model import CostModel, Load, PlannedMode


@dataclass(frozen=True)
class ModeDecision:
    """A mode, why, and the predicted seconds for one block of every open request in either mode."""

    mode: PlannedMode
    reason: str
    ar_seconds: float
    diffusion_seconds: float


class ModeChooser:
    """Chooses between autoregression and mask diffusion without flapping.

    The mode changes only if the other is predicted to be faster by more than ``margin``, and not before
    ``min_dwell`` decisions were made since the last change: requests of both modes in a batch read both towers in
    every step, which is slower than either. The margin bounds what waiting costs at a steady load.

    ``cost_model`` may be replaced at any time, for example by one with newly fitted hardware.
    """

    def __init__(self, cost_model: CostModel, margin: float = 0.03, min_dwell: int = 8):
        if margin < 0 or min_dwell < 0:
            raise ValueError(f"margin ({margin}) and min_dwell ({min_dwell}) must not be negative")
        self.cost_model = cost_model
        self._margin = margin
        self._min_dwell = min_dwell
        self._mode: PlannedMode | None = None
        self._since_change = 0

    def choose(self, load: Load) -> ModeDecision:
        """The mode for a request that starts now; ``load.num_open`` counts it too."""
        ar, diffusion = (self.cost_model.block_seconds(mode, load) for mode in ("ar", "mask_diffusion"))
        faster: PlannedMode = "mask_diffusion" if diffusion < ar else "ar"
        gain = max(ar, diffusion) / min(ar, diffusion) - 1
        self._since_change += 1
        if self._mode is None:
            reason = f"first decision: {faster} is predicted to be {gain:.1%} faster"
        elif faster == self._mode:
            reason = f"kept: {faster} is predicted to be {gain:.1%} faster"
        elif gain <= self._margin:
            reason = f"kept: {faster} is predicted to be {gain:.1%} faster, within the margin of {self._margin:.0%}"
        elif self._since_change <= self._min_dwell:
            reason = f"kept: {self._since_change} decisions since the last change, at least {self._min_dwell} are made"
        else:
            reason = f"changed: {faster} is predicted to be {gain:.1%} faster"
        if self._mode is None or reason.startswith("changed"):
            self._mode, self._since_change = faster, 0
        return ModeDecision(self._mode, reason, ar, diffusion)
