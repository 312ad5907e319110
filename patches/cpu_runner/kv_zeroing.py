"""Zeroing of newly allocated KV-cache blocks in numpy (upstream: vllm/v1/worker/utils.py)."""

import ctypes
from typing import Any

import numpy as np

from vllm_twotower.patches.cpu_runner.kernel import CpuKernel


@CpuKernel
def zero_kv_blocks(
    seg_addrs: np.ndarray,  # [segments] uint64: address of block 0
    seg_block_strides: np.ndarray,  # [segments] int64: int32 elements from block to block
    seg_page_sizes: np.ndarray,  # [segments] int64: int32 elements to clear per block
    block_ids: np.ndarray,  # [blocks] int64, not empty
    **_launch_options: Any,
) -> None:
    """Clear the given blocks of every memory segment. A segment is one layer's part of the cache, known by address."""
    num_pages = int(block_ids.max()) + 1
    segments = zip(seg_addrs.tolist(), seg_block_strides.tolist(), seg_page_sizes.tolist(), strict=True)
    for address, block_stride, page_size in segments:
        pages_at(address, num_pages, block_stride, page_size)[block_ids] = 0


def pages_at(address: int, num_pages: int, stride: int, page_size: int) -> np.ndarray:
    """A view [num_pages, page_size] of this process's memory as int32; valid as long as the memory's owner lives."""
    memory = (ctypes.c_int32 * ((num_pages - 1) * stride + page_size)).from_address(address)
    return np.ndarray((num_pages, page_size), np.int32, buffer=memoryview(memory).cast("B"), strides=(4 * stride, 4))
