"""What a device can do, in the few numbers that the cost model asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf


@dataclass(frozen=True)
class Hardware:
    """One GPU (or CPU), its link to the others, and what it costs to start work on it.

    ``memory_bandwidth`` and ``link_bandwidth`` (of one direction) are in bytes/s, ``flops`` in FLOP/s of dense matrix
    products in bf16, ``memory_bytes`` in bytes, every other figure in seconds. ``source`` says where the figures are
    from. ``speedups`` is how much faster matrix products with weights of another dtype are than in bf16, where the
    device multiplies in it; elsewhere such weights are only smaller.

    ``overlaps``: memory traffic and arithmetic of a tower pass hide each other, so that the longer of the two counts,
    the ideal of a GPU. Otherwise they add up, as where some kernels wait for memory and others for arithmetic.
    """

    name: str
    memory_bandwidth: float
    flops: float
    memory_bytes: float
    source: str
    link_bandwidth: float = inf
    link_latency: float = 0.0
    seconds_per_step: float = 0.0
    """Of an engine step, whatever is in it: scheduling, preparing inputs, returning tokens."""
    seconds_per_context_pass: float = 0.0
    """Of a run of the context tower over any number of rows: launches, kernels that are waited for."""
    seconds_per_denoiser_pass: float = 0.0
    """The same of the denoiser, with unmasking."""
    seconds_per_row: float = 0.0
    """Of one request's row in a tower pass."""
    overlaps: bool = True
    speedups: Mapping[str, float] = field(default_factory=dict)

    def roofline_seconds(self, memory_bytes: float, flops: float) -> float:
        """Seconds for memory traffic and arithmetic alone."""
        memory, compute = memory_bytes / self.memory_bandwidth, flops / self.flops
        return max(memory, compute) if self.overlaps else memory + compute


ACHIEVED_BANDWIDTH, ACHIEVED_FLOPS = 4.3 / 4.8, 750 / 989
"""Of the data sheet's memory bandwidth and bf16 rate, what copies and matrix products reached on an H200. The same
shares are taken for every card."""

_FP8, _FP4 = {"fp8": 2.0}, {"fp8": 2.0, "nvfp4": 4.0}


def _card(
    name: str,
    terabytes: float,
    teraflops: float,
    gigabytes: float,
    link_gigabytes: float,
    link_latency: float,
    speedups: Mapping[str, float],
    sheet: str,
) -> Hardware:
    """A card from its data sheet: TB/s, dense bf16 TFLOP/s, GB, GB/s of its link in one direction, s."""
    return Hardware(
        name,
        terabytes * 1e12 * ACHIEVED_BANDWIDTH,
        teraflops * 1e12 * ACHIEVED_FLOPS,
        gigabytes * 1e9,
        f"{sheet}: {terabytes:g} TB/s and {teraflops:g} TFLOP/s, of which {ACHIEVED_BANDWIDTH:.0%} and "
        f"{ACHIEVED_FLOPS:.0%} are taken",
        link_gigabytes * 1e9,
        link_latency,
        speedups=speedups,
    )


# Each from NVIDIA's data sheet of this name, sparse rates halved. Links: NVLink, or PCIe x16, or GB10's 200 Gbit/s
# network port. Their latencies are assumed.
DEVICES = {
    card.name: card
    for card in (
        _card("A100-40GB", 1.555, 312, 40, 300, 10e-6, {}, "A100 data sheet, 40 GB SXM"),
        _card("A100-80GB", 2.039, 312, 80, 300, 10e-6, {}, "A100 data sheet, 80 GB SXM"),
        _card("H100", 3.35, 989, 80, 450, 10e-6, _FP8, "H100 data sheet, SXM"),
        _card("H200", 4.8, 989, 141, 450, 10e-6, _FP8, "H200 data sheet, SXM"),
        _card("B200", 8, 2250, 180, 900, 10e-6, _FP4, "DGX B200 data sheet, an eighth of it"),
        _card("RTX-PRO-6000", 1.792, 504, 96, 64, 20e-6, _FP4, "RTX PRO 6000 Blackwell data sheet, PCIe 5"),
        _card("L40S", 0.864, 362, 48, 32, 20e-6, _FP8, "L40S data sheet, PCIe 4"),
        _card("GB10", 0.273, 125, 128, 25, 30e-6, _FP4, "DGX Spark data sheet, an eighth of 1 PFLOP/s of sparse FP4"),
    )
}
"""Cards that people own, by name, without overheads: an ideal engine. ``calibration.py`` has those of real ones."""
