"""Options of some rows for tests of the sampler's functions."""

from __future__ import annotations

import torch

from vllm_twotower.sampling.row_options import RowOptions


def row_options(rows: int, **columns: list) -> RowOptions:
    """The default options of ``rows`` rows but for the given columns."""
    defaults = {
        "max_steps": 16,
        "confidence_threshold": 0.8,
        "noise_schedule": 0,
        "adaptive_unmasking": False,
        "remasking": 0,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
        "min_p": 0.0,
        "seed": 0,
    }
    return RowOptions(**{name: torch.tensor(columns.get(name, [value] * rows)) for name, value in defaults.items()})
