"""Attention of the denoiser's blocks in training whose memory grows with a sequence's length, not with its square.

Each way is a :data:`~vllm_twotower.reference.layers.BlockAttention`, as is ``dense_blocks``.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from vllm_twotower.reference.layers import Attend, BlockAttention, dense_blocks
from vllm_twotower.training.config import TrainConfig, TrainConfigError

TILE = 128
"""Queries, and keys, of a tile of FlexAttention's mask."""

_fused_attention = torch.compile(flex_attention)  # without the compiler it holds the scores of all pairs


def block_attention(config: TrainConfig, device: torch.device) -> BlockAttention:
    """The configured way; by default flex on GPUs and dense on CPUs. Raises TrainConfigError if it cannot run there."""
    on_gpu = device.type == "cuda"
    choice = config.attention or ("flex" if on_gpu else "dense")
    if choice != "dense" and not on_gpu:
        raise TrainConfigError(f"attention is {choice!r}, which has gradients on GPUs only: here it must be 'dense'")
    if choice == "xformers" and find_spec("xformers") is None:
        raise TrainConfigError(
            "attention is 'xformers', which is not installed: pip install 'vllm-twotower[train-gpu]', "
            "or choose 'flex' or 'dense'"
        )
    if choice == "xformers" and not config.bf16_autocast:
        raise TrainConfigError(
            "attention is 'xformers', which needs bf16_autocast: true and a GPU that has bf16: "
            "in fp32 it must be 'flex' or 'dense'"
        )
    return {"dense": dense_blocks, "flex": flex_blocks, "xformers": xformers_blocks}[choice]


def flex_blocks(block_starts: Tensor, width: int, length: int) -> Attend:
    """PyTorch's FlexAttention. Without gradients it runs on CPUs too."""
    mask = tile_mask(block_starts, width, length)

    def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        queries, keys, values = (x.transpose(1, 2) for x in (queries, keys, values))
        return _fused_attention(queries, keys, values, block_mask=mask, enable_gqa=True).transpose(1, 2)

    return attend


def tile_mask(block_starts: Tensor, width: int, length: int) -> BlockMask:
    """Which of L + N * S keys the N * S queries of blocks see, from starts (B, N), S = ``width`` and L = ``length``.

    Made of what is known of whole tiles: ``create_block_mask`` would hold a mask of all pairs.
    """

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = length + query // width * width
        return (key < block_starts[b, query // width]) | ((key >= own) & (key < own + width))

    device = block_starts.device
    queries = block_starts.shape[1] * width
    first = torch.arange(0, queries, TILE, device=device)  # query of every row of tiles
    last = (first + TILE).clamp(max=queries) - 1
    starts = F.pad(block_starts.repeat_interleave(width, 1), (0, -queries % TILE))
    # Padding counts as queries that see nothing, which keeps the last row from having tiles that are seen as a whole.
    least, most = (bound[..., None] for bound in starts.unflatten(1, (-1, TILE)).aminmax(dim=2))
    own_from, own_to = ((length + x)[:, None] for x in (first // width * width, (last // width + 1) * width))
    key = torch.arange(0, length + queries, TILE, device=device)  # first of every column
    whole = key + TILE <= least
    some = (key < most) | ((key < own_to) & (key + TILE > own_from))
    (partial_count, partial_tiles), (whole_count, whole_tiles) = (_listed(tiles) for tiles in (some & ~whole, whole))
    return BlockMask.from_kv_blocks(
        partial_count,
        partial_tiles,
        whole_count,
        whole_tiles,
        BLOCK_SIZE=TILE,
        mask_mod=sees,
        seq_lengths=(queries, length + queries),
    )


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Of tiles (B, rows, columns) that are true: how many a row has (B, 1, rows), and the columns with those first."""
    columns = tiles.byte().argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32)[:, None], columns.int()[:, None]


@torch.compiler.disable
def xformers_blocks(block_starts: Tensor, width: int, length: int) -> Attend:
    """xFormers, on GPUs in bf16: blocks with near starts attend together to what all of them see, and each to its rest.

    Where prefixes share keys none of its masks has gradients, so the rests are copied. A group's blocks are neighbours
    in the order of their starts: all groups together copy at most L tokens for each block of one group.
    """
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask
    from xformers.ops.fmha.merge_training import memory_efficient_attention_partial_autograd as attend_to
    from xformers.ops.fmha.merge_training import merge_attentions_autograd as merge

    size = max(1, TILE // width)
    order = block_starts.argsort(1)
    to_sorted, to_blocks = (index[..., None, None, None] for index in (order, order.argsort(1)))
    groups: list[list[tuple[int, Tensor, BlockDiagonalMask]]] = []  # of every sequence: seen by all, rests, their mask
    for starts, numbers in zip(block_starts.tolist(), order.tolist(), strict=True):
        groups.append([])
        for first in range(0, len(numbers), size):
            group = numbers[first : first + size]
            shared = starts[group[0]]
            rests = [[*range(shared, starts[n]), *range(length + n * width, length + (n + 1) * width)] for n in group]
            lengths = [width] * len(group), list(map(len, rests))
            mask = BlockDiagonalMask.from_seqlens(*lengths, device=block_starts.device)
            groups[-1].append((shared, torch.tensor(sum(rests, []), device=block_starts.device), mask))

    @torch.compiler.disable
    def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        repeats = queries.shape[2] // keys.shape[2]
        keys, values = (x.repeat_interleave(repeats, 2) for x in (keys, values))  # gradients need equal heads
        queries = queries.unflatten(1, (-1, width)).take_along_dim(to_sorted, 1)
        outputs = []
        for q, k, v, of_sequence in zip(queries, keys, values, groups, strict=True):
            for q_group, (shared, rest, mask) in zip(q.split(size), of_sequence, strict=True):
                q_group = q_group.flatten(0, 1)[None]
                parts = [attend_to(q_group, k[rest][None], v[rest][None], mask)]
                if shared:
                    parts.append(attend_to(q_group, k[None, :shared], v[None, :shared]))
                outputs.append(merge(*parts)[0])
        return torch.cat(outputs).view_as(queries).take_along_dim(to_blocks, 1).flatten(1, 2)

    return attend
