"""What the CPU replacements of vLLM's Triton kernels share.

They are written in numpy: at the sizes of one engine step its operations cost about a third of torch's.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor


class CpuKernel:
    """Stands in for a Triton kernel: ``kernel[grid](...)`` calls a numpy function with the same parameters.

    The function gets the tensors as arrays on the same memory and writes its results into them. It works on whole
    arrays, so it needs neither the grid nor launch options such as BLOCK_SIZE.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self.launch

    def launch(self, *args: Any, **options: Any) -> None:
        self.function(*(arg.numpy() if isinstance(arg, Tensor) else arg for arg in args), **options)


def rows_and_offsets(bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each element of the rows bounded by `bounds` [R + 1]: its row and its offset inside the row, [elements]."""
    starts = bounds[:-1]
    rows = np.arange(starts.shape[0]).repeat(bounds[1:] - starts)
    return rows, np.arange(bounds[0], bounds[-1]) - starts[rows]


def bounds_of(lens: np.ndarray) -> np.ndarray:
    """Row bounds [R + 1], from 0 on, of rows with these lengths [R]."""
    bounds = np.zeros(lens.shape[0] + 1, dtype=np.int64)
    lens.cumsum(out=bounds[1:])
    return bounds
