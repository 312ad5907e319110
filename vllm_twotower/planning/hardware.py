"""What a device can do, in the few numbers that the cost model asks for."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf


@dataclass(frozen=True)
class Hardware:
    """One GPU (or CPU), its link to the others, and what it costs to start work on it.

    ``memory_bandwidth`` and ``link_bandwidth`` (of one direction) are in bytes/s, ``flops`` in FLOP/s of dense matrix
    products in the model's dtype, ``memory_bytes`` in bytes, every other figure in seconds. ``source`` says where the
    figures are from, and which of them are nominal.

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

    def roofline_seconds(self, memory_bytes: float, flops: float) -> float:
        """Seconds for memory traffic and arithmetic alone."""
        memory, compute = memory_bytes / self.memory_bandwidth, flops / self.flops
        return max(memory, compute) if self.overlaps else memory + compute


_NVIDIA = "nominal (NVIDIA data sheet), dense bf16; link latency assumed"

DEVICES = {
    device.name: device
    for device in (
        Hardware("A100-80GB", 2.039e12, 312e12, 80e9, _NVIDIA, 300e9, 10e-6),
        Hardware("H100", 3.35e12, 989e12, 80e9, f"SXM; {_NVIDIA}", 450e9, 10e-6),
        Hardware(
            "H200",
            4.3e12,
            750e12,
            141e9,
            "measured copy bandwidth and bf16 matrix products (nominal 4.8 TB/s, 989 TFLOP/s); link nominal",
            450e9,
            10e-6,
        ),
        Hardware("B200", 8e12, 2250e12, 180e9, _NVIDIA, 900e9, 10e-6),
        Hardware("L40S", 0.864e12, 362e12, 48e9, f"PCIe; {_NVIDIA}", 32e9, 20e-6),
        Hardware(
            "GB10",
            0.273e12,
            125e12,
            128e9,
            "nominal 273 GB/s and 1 PFLOP/s of sparse FP4, an eighth of it in dense bf16; 200 Gbit/s Ethernet, "
            "latency assumed",
            25e9,
            30e-6,
        ),
    )
}
"""Known devices by name, without overheads: an ideal engine. Fit those of a real one (see ``fit.py``)."""
