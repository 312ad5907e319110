"""Staged writes in numpy (upstream: vllm/v1/worker/gpu/buffer_utils.py).

The worker collects writes to its per-request tables on the host and applies them once per step.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from vllm_twotower.patches.cpu_runner.kernel import CpuKernel, rows_and_offsets


@CpuKernel
def apply_write(
    output: np.ndarray,  # [rows] or [rows, columns], int32 / int64 / float32, changed in place
    output_stride: int,
    write_indices: np.ndarray,  # [writes] int32: row
    write_starts: np.ndarray,  # [writes] int32: first column
    write_contents: np.ndarray,  # [elements] like output: the contents of all writes, one after the other
    write_cu_lens: np.ndarray,  # [writes] int32: end of each write's contents
    write_group_ids: None,
    MULTI_GROUP: bool = False,
    **_launch_options: Any,
) -> None:
    """Copy each write's contents into its row from its start column on."""
    if MULTI_GROUP:
        raise ValueError("writes to several tables come one table at a time: see apply_by_group")
    bounds = np.concatenate(((0,), write_cu_lens))
    write, offset = rows_and_offsets(bounds)
    first = write_indices.astype(np.int64) * output_stride + write_starts
    output.reshape(-1)[first[write] + offset] = write_contents[: bounds[-1]]


def apply_by_group(self: Any, tensors: Sequence[Any], output_ptrs: Tensor, output_strides: Tensor) -> None:
    """Apply and clear the staged writes of each tensor in turn; on a CPU raw pointers gain nothing."""
    for tensor in tensors:
        tensor.apply_write()
