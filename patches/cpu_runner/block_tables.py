"""Block tables and slot mappings in numpy (upstream: vllm/v1/worker/gpu/block_table.py).

The two methods are replaced rather than their kernels: the kernels get raw pointers to the groups' tables, the methods
have the tables themselves.

Shapes: R = rows (requests) of this step, T = its tokens, G = KV-cache groups.
"""

from typing import Any

import numpy as np
from torch import Tensor

PAD_SLOT_ID = -1


def gather_block_tables(
    self: Any,
    idx_mapping: Tensor,  # [R]
    num_reqs_padded: int,
    out: tuple[Tensor, ...] | None = None,  # G x [max_num_reqs, max_num_blocks] int32
    out_ptrs: Tensor | None = None,
    num_computed_tokens: Tensor | None = None,  # for groups with a sliding window, which TwoTower does not have
) -> tuple[Tensor, ...]:
    """Copy the rows' used block ids to the persistent input tables and zero the padding rows.

    What lies behind a row's last used block stays as it was. Returns G views [num_reqs_padded, max_num_blocks].
    """
    tables = tuple(self.input_block_tables) if out is None else out
    slots = idx_mapping.numpy()
    num_reqs = slots.shape[0]
    num_blocks = self.num_blocks.gpu.numpy()[:, slots, None]  # [G, R, 1]
    for source, table, used in zip(self.block_tables, tables, num_blocks, strict=True):
        target = table.numpy()
        width = used.max(initial=0)
        is_used = np.arange(width) < used
        np.copyto(target[:num_reqs, :width], source.gpu.numpy()[slots, :width], where=is_used)
        target[num_reqs:num_reqs_padded] = 0
    return tuple(table[:num_reqs_padded] for table in tables)


def compute_slot_mappings(
    self: Any,
    idx_mapping: Tensor,  # [R]; a negative slot marks a dummy row, which owns no blocks
    query_start_loc: Tensor,  # [>= R + 1]
    positions: Tensor,  # [>= T] int64
    num_tokens_padded: int,
    out: Tensor | None = None,  # [G, max_num_tokens] int64
) -> Tensor:
    """Write each token's place in each group's KV cache; PAD_SLOT_ID behind the last token, for dummies and for
    groups without slots. Returns a view of shape [G, num_tokens_padded].
    """
    if self.cp_size != 1:
        raise ValueError(f"decode_context_parallel_size={self.cp_size} is not supported on a CPU: it must be 1")
    slot_mappings = self.slot_mappings if out is None else out
    mappings = slot_mappings.numpy()
    bounds = query_start_loc.numpy()[: idx_mapping.shape[0] + 1]
    first, end = bounds[0], bounds[-1]
    slots = idx_mapping.numpy().repeat(bounds[1:] - bounds[:-1])
    is_dummy = slots < 0
    has_dummies = is_dummy.any()
    token_positions = positions.numpy()[first:end]

    for group, block_size in enumerate(self.block_sizes):
        mapping = mappings[group]
        mapping[end:] = PAD_SLOT_ID
        if not self._slot_mapping_enabled[group]:
            mapping[first:end] = PAD_SLOT_ID
            continue
        blocks = token_positions // block_size
        # From position to slot: exchange the block's number in the sequence for its number in the cache.
        moved_blocks = self.block_tables[group].gpu.numpy()[slots, blocks] - blocks
        np.add(token_positions, moved_blocks * block_size, out=mapping[first:end])
        if has_dummies:
            mapping[first:end][is_dummy] = PAD_SLOT_ID
    return slot_mappings[:, :num_tokens_padded]
