"""Zeroing of newly allocated KV-cache blocks in torch (upstream: vllm/v1/worker/utils.py)."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from vllm_twotower.patches._torch_kernel import REMOVE_WHEN, UPSTREAM, kernel_installer, when_kernel_cannot_launch
from vllm_twotower.patches.registry import Patch

ZERO_KV_BLOCKS = "vllm.v1.worker.utils:_zero_kv_blocks_kernel"


def zero_kv_blocks(
    seg_addrs: Tensor,  # [segments] uint64: address of block 0
    seg_block_strides: Tensor,  # [segments] int64: int32 elements from block to block
    seg_page_sizes: Tensor,  # [segments] int64: int32 elements to clear per block
    block_ids: Tensor,  # [blocks] int64
    **_launch_options: Any,
) -> None:
    """Clear the given blocks of every memory segment. A segment is one layer's part of the cache, known by address."""
    last_block = int(block_ids.max())
    segments = zip(seg_addrs.tolist(), seg_block_strides.tolist(), seg_page_sizes.tolist(), strict=True)
    for address, block_stride, page_size in segments:
        memory = int32_memory(address, last_block * block_stride + page_size)
        pages = memory.as_strided((last_block + 1, page_size), (block_stride, 1))
        pages.index_fill_(0, block_ids, 0)


def int32_memory(address: int, size: int) -> Tensor:
    """A view of `size` int32 elements of this process's memory; valid as long as their owner lives."""
    return torch.frombuffer((ctypes.c_int32 * size).from_address(address), dtype=torch.int32)


PATCHES = (
    Patch(
        name="zero-kv-blocks",
        target=ZERO_KV_BLOCKS,
        what="Runs the kernel of KVBlockZeroer.zero_block_ids in torch.",
        why="Hybrid models have new blocks zeroed; without Triton the first allocation fails.",
        upstream=UPSTREAM,
        remove_when=REMOVE_WHEN,
        applies_when=when_kernel_cannot_launch(ZERO_KV_BLOCKS),
        sources=(ZERO_KV_BLOCKS, "vllm.v1.worker.utils:KVBlockZeroer"),
        source_sha256={"0.32.0": "dcef37dfe7494f36f77cdf4ba0b1bc93ca8703026fcf4bb04c0d6ec134317300"},
        install=kernel_installer(ZERO_KV_BLOCKS, zero_kv_blocks),
    ),
)
