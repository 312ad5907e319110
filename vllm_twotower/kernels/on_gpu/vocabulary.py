"""The kernel of :mod:`vllm_twotower.kernels.vocabulary`: tiles of rows, then the tiles of each row together."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096


@triton.jit
def _of_tiles(
    tokens, largest, sums, logits, vocabulary, row_stride, never, NUM_TILES: tl.constexpr, TILE_SIZE: tl.constexpr
):
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = tile * TILE_SIZE + tl.arange(0, TILE_SIZE)
    is_possible = (token < vocabulary) & (token != never)
    values = tl.load(logits + row * row_stride + token, mask=is_possible, other=float("-inf")).to(tl.float32)
    best = tl.max(values, 0)
    out = row * NUM_TILES + tile
    tl.store(tokens + out, tile * TILE_SIZE + tl.argmax(values, 0))
    tl.store(largest + out, best)
    # A tile of impossible tokens has no largest one to subtract.
    tl.store(sums + out, tl.sum(tl.exp(values - tl.where(best == float("-inf"), 0.0, best)), 0))


@triton.jit
def _of_rows(
    token_out, largest_out, logsumexp_out, tokens, largest, sums, NUM_TILES: tl.constexpr, PADDED: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, PADDED)
    is_tile = tile < NUM_TILES
    values = tl.load(largest + row * NUM_TILES + tile, mask=is_tile, other=float("-inf"))
    best = tl.max(values, 0)
    total = tl.load(sums + row * NUM_TILES + tile, mask=is_tile, other=0.0)
    total = tl.sum(total * tl.exp(values - tl.where(best == float("-inf"), 0.0, best)), 0)
    tl.store(token_out + row, tl.load(tokens + row * NUM_TILES + tl.argmax(values, 0)))
    tl.store(largest_out + row, best)
    tl.store(logsumexp_out + row, best + tl.log(total))


def row_statistics(logits: Tensor, never: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Token, largest logit and logsumexp of each row; the last dimension is contiguous."""
    rows, vocabulary = logits.shape
    num_tiles = triton.cdiv(vocabulary, TILE)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    of_tiles = empty(rows, num_tiles, dtype=torch.int64), empty(rows, num_tiles), empty(rows, num_tiles)
    of_rows = empty(rows, dtype=torch.int64), empty(rows), empty(rows)
    nothing = -1 if never is None else never
    _of_tiles[rows, num_tiles](
        *of_tiles, logits, vocabulary, logits.stride(0), nothing, NUM_TILES=num_tiles, TILE_SIZE=TILE
    )
    padded = triton.next_power_of_2(num_tiles)
    _of_rows[(rows,)](*of_rows, *of_tiles, NUM_TILES=num_tiles, PADDED=padded)
    return of_rows
