"""Prefix caching: what outlives a request holds exactly the tokens it can be found by.

A later request may start from pages of keys and values and the Mamba states at the last page's end. vLLM ends prompt
chunks where it wants such states, and the context tower stops there in generated text (``step_rows``).
Behind a page's end its states move on to new slots (:func:`move_states`), and a page can be found only once the context
tower has read it (:class:`FoundPages`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.kv_cache_interface import KVCacheConfig, MambaSpec
from vllm.v1.request import Request

from .tower_rows import TowerRows

Numbers = TypeVar("Numbers", np.ndarray, torch.Tensor)


def state_block_size(kv_cache_config: KVCacheConfig, max_model_len: int) -> int:
    """The tokens of a page, each with a slot for its Mamba states; without prefix caching a request has one slot."""
    specs = (group.kv_cache_spec for group in kv_cache_config.kv_cache_groups)
    return next((spec.block_size for spec in specs if isinstance(spec, MambaSpec)), max_model_len)


def check_page_size(kv_cache_config: KVCacheConfig, canvas_length: int) -> None:
    """Raises ValueError if two canvases do not fit into a page; then a request could need more slots than vLLM counts.

    vLLM decides on the size of pages after the configuration is made.
    """
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        if isinstance(spec, MambaSpec) and spec.mamba_cache_mode == "align" and spec.block_size < 2 * canvas_length:
            raise ValueError(
                f"canvas_length={canvas_length} is not supported with prefix caching in pages of {spec.block_size} "
                f"tokens: set block_size={2 * canvas_length} or more, or enable_prefix_caching=False"
            )


def commit_interval(kv_cache_config: KVCacheConfig, max_model_len: int) -> int:
    """The tokens between two positions of generated text where Mamba states are cached; by default there are none."""
    interval = kv_cache_config.prefix_cache_retention_interval
    if interval == 0:
        return max_model_len
    return interval or state_block_size(kv_cache_config, max_model_len)


def next_stop(position: np.ndarray, interval: int) -> np.ndarray:
    """The next position where the context tower stops."""
    return (position // interval + 1) * interval


def state_column(num_tokens: Numbers, block_size: int) -> Numbers:
    """Where in a request's Mamba block table the state after so many tokens lies (before the first: anywhere)."""
    return (num_tokens - 1).clip(min=0) // block_size


def move_states(
    reads: TowerRows, block_size: int, layers: Iterable[tuple[torch.Tensor, tuple[torch.Tensor, ...]]]
) -> None:
    """Copies the states of rows whose tokens go on to another page to the slots that the pass writes.

    ``layers``: each Mamba layer's block table (rows of vLLM's batch, columns) and its states, one slot after the other.
    """
    source, target = state_column(reads.starts, block_size), state_column(reads.ends, block_size)
    rows = np.flatnonzero((reads.starts > 0) & (source != target))
    if not len(rows):
        return
    for table, states in layers:
        moved = (reads.batch_rows[rows], source[rows], target[rows])
        row, old, new = (async_tensor_h2d(x, device=table.device) for x in moved)
        for state in states:
            state[table[row, new]] = state[table[row, old]]


class FoundPages:
    """Makes vLLM's KV cache manager count tokens as the context tower reads them, not as the scheduler computes them.

    ``unread(request)`` are the last of the computed tokens that the context tower reads in a later step. Their pages
    are neither cached nor their predecessors' states released. A prompt chunk of a request that is admitted is read in
    the same step for certain, and requests admitted with it may share it; everything else is cached afterwards.
    """

    def __init__(self, manager: KVCacheManager, unread: Callable[[Request], int]):
        self._manager, self._unread = manager, unread
        self._allocate, self._cache = manager.allocate_slots, manager.cache_blocks
        manager.allocate_slots, manager.cache_blocks = self._allocate_slots, self._cache_blocks

    def cache(self, *requests: Request) -> None:
        """Lets later requests find what the context tower has read of these in completed steps."""
        for request in requests:
            self._cache_blocks(request, request.num_computed_tokens - request.num_in_flight_tokens)

    def forget(self, request: Request) -> None:
        """Lets no later request find a page of this one, whose tokens the context tower may have read wrongly."""
        groups = self._manager.get_block_ids(request.request_id)
        self._manager.evict_blocks({block for group in groups for block in group})

    def _cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """The manager's ``cache_blocks``."""
        self._cache(request, max(0, min(num_computed_tokens - self._unread(request), request.num_tokens)))

    def _allocate_slots(
        self, request: Request, num_new_tokens: int, num_new_computed_tokens: int = 0, **options: Any
    ) -> KVCacheBlocks | None:
        """The manager's ``allocate_slots``."""
        options["delay_cache_blocks"] = True
        if request.num_computed_tokens == 0:
            blocks = self._allocate(request, num_new_tokens, num_new_computed_tokens, **options)
            if blocks is not None:
                self._cache_blocks(request, num_new_computed_tokens + num_new_tokens)
            return blocks
        # The manager releases nothing that tokens in flight need.
        unread = self._unread(request)
        request.num_in_flight_tokens += unread
        blocks = self._allocate(request, num_new_tokens, num_new_computed_tokens, **options)
        request.num_in_flight_tokens -= unread
        return blocks
