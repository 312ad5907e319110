"""Staged writes in numpy (upstream: vllm/v1/worker/gpu/buffer_utils.py).

The worker collects writes to its per-request tables on the host and applies them once per step.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from vllm_twotower.patches._cpu_kernel import (
    REMOVE_WHEN,
    UPSTREAM,
    kernel_installer,
    rows_and_offsets,
    when_kernel_cannot_launch,
)
from vllm_twotower.patches.registry import Patch, replace

MODULE = "vllm.v1.worker.gpu.buffer_utils"
APPLY_WRITE = f"{MODULE}:_apply_write_kernel"
FUSED_APPLY = f"{MODULE}:FusedStagedWriter.apply"


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


PATCHES = (
    Patch(
        name="apply-write",
        target=APPLY_WRITE,
        what="Runs the kernel of StagedWriteTensor.apply_write in numpy.",
        why="Without Triton no new request and no new block ever reaches the worker's tables.",
        upstream=UPSTREAM,
        remove_when=REMOVE_WHEN,
        applies_when=when_kernel_cannot_launch(APPLY_WRITE),
        sources=(APPLY_WRITE, f"{MODULE}:StagedWriteTensor"),
        source_sha256={"0.32.0": "229364af666b85e94b57156473d022dd67ff6f814fc3df00964cabff1547651c"},
        install=kernel_installer(APPLY_WRITE, apply_write),
    ),
    Patch(
        name="fused-apply-write",
        target=FUSED_APPLY,
        what="FusedStagedWriter.apply lets each KV-cache group's table apply its own staged writes.",
        why="Upstream hands all groups to one Triton kernel as raw pointers, which numpy cannot write through.",
        upstream=UPSTREAM,
        remove_when=REMOVE_WHEN,
        applies_when=when_kernel_cannot_launch(APPLY_WRITE),
        sources=(f"{MODULE}:FusedStagedWriter",),
        source_sha256={"0.32.0": "b9f2a612a2d85492eb855f0c05f60620317562fb567c6e7027fd10d5f047ad97"},
        install=lambda: replace(FUSED_APPLY, apply_by_group),
    ),
)
