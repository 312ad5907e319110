"""The kernels of :mod:`vllm_twotower.kernels.vocabulary`: tiles of rows, then the tiles of each row together."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096


@triton.jit
def _of_tiles(
    tokens,
    largest,
    sums,
    seconds,
    logits,
    vocabulary,
    row_stride,
    never,
    NEEDS_SECOND: tl.constexpr,
    NUM_TILES: tl.constexpr,
    TILE_SIZE: tl.constexpr,
):
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = tile * TILE_SIZE + tl.arange(0, TILE_SIZE)
    is_possible = (token < vocabulary) & (token != never)
    values = tl.load(logits + row * row_stride + token, mask=is_possible, other=float("-inf")).to(tl.float32)
    best, place = tl.max(values, 0), tl.argmax(values, 0)
    out = row * NUM_TILES + tile
    tl.store(tokens + out, tile * TILE_SIZE + place)
    if NEEDS_SECOND:
        others = tl.where(tl.arange(0, TILE_SIZE) == place, float("-inf"), values)
        tl.store(seconds + out, tl.max(others, 0))
    tl.store(largest + out, best)
    # A tile of impossible tokens has no largest one to subtract.
    tl.store(sums + out, tl.sum(tl.exp(values - tl.where(best == float("-inf"), 0.0, best)), 0))


@triton.jit
def _of_rows(
    token_out,
    largest_out,
    logsumexp_out,
    second_out,
    tokens,
    largest,
    sums,
    seconds,
    NEEDS_SECOND: tl.constexpr,
    NUM_TILES: tl.constexpr,
    PADDED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, PADDED)
    is_tile = tile < NUM_TILES
    values = tl.load(largest + row * NUM_TILES + tile, mask=is_tile, other=float("-inf"))
    best, place = tl.max(values, 0), tl.argmax(values, 0)
    total = tl.load(sums + row * NUM_TILES + tile, mask=is_tile, other=0.0)
    total = tl.sum(total * tl.exp(values - tl.where(best == float("-inf"), 0.0, best)), 0)
    tl.store(token_out + row, tl.load(tokens + row * NUM_TILES + place))
    tl.store(largest_out + row, best)
    tl.store(logsumexp_out + row, best + tl.log(total))
    if NEEDS_SECOND:
        of_tile = tl.load(seconds + row * NUM_TILES + place)
        tl.store(second_out + row, tl.maximum(tl.max(tl.where(tile == place, float("-inf"), values), 0), of_tile))


def row_statistics(
    logits: Tensor, never: int | None = None, needs_second: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token, largest logit, logsumexp and second largest logit; the last dimension is contiguous."""
    rows, vocabulary = logits.shape
    num_tiles = triton.cdiv(vocabulary, TILE)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    of_tiles = (
        empty(rows, num_tiles, dtype=torch.int64),
        *(empty(rows, num_tiles) for _ in range(2)),
        empty(rows * needs_second, num_tiles),
    )
    of_rows = empty(rows, dtype=torch.int64), empty(rows), empty(rows), empty(rows * needs_second)
    nothing = -1 if never is None else never
    sizes = {"NEEDS_SECOND": needs_second, "NUM_TILES": num_tiles}
    _of_tiles[rows, num_tiles](*of_tiles, logits, vocabulary, logits.stride(0), nothing, TILE_SIZE=TILE, **sizes)
    _of_rows[(rows,)](*of_rows, *of_tiles, PADDED=triton.next_power_of_2(num_tiles), **sizes)
    return of_rows


@triton.jit
def _tempered(logits, token, vocabulary, never, largest, temperature):
    is_possible = (token < vocabulary) & (token != never)
    values = tl.load(logits + token, mask=is_possible, other=float("-inf")).to(tl.float32)
    return tl.where(is_possible, tl.exp((values - largest) / temperature), 0.0)


@triton.jit
def _masses(
    parts,
    logits,
    largest,
    temperature,
    vocabulary,
    row_stride,
    never,
    NUM_TILES: tl.constexpr,
    TILE_SIZE: tl.constexpr,
):
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = tile * TILE_SIZE + tl.arange(0, TILE_SIZE)
    of_row = tl.load(largest + row), tl.load(temperature + row)
    mass = _tempered(logits + row * row_stride, token, vocabulary, never, of_row[0], of_row[1])
    tl.store(parts + row * NUM_TILES + tile, tl.sum(mass.to(tl.float64), 0))


def masses(logits: Tensor, largest: Tensor, temperature: Tensor, never: int | None = None) -> Tensor:
    """The mass of every tile of each row; the last dimension is contiguous."""
    rows, vocabulary = logits.shape
    parts = torch.empty(rows, triton.cdiv(vocabulary, TILE), dtype=torch.float64, device=logits.device)
    nothing = -1 if never is None else never
    sizes = {"NUM_TILES": parts.shape[1], "TILE_SIZE": TILE}
    _masses[parts.shape](parts, logits, largest, temperature, vocabulary, logits.stride(0), nothing, **sizes)
    return parts


@triton.jit
def _drawn(
    token_out,
    logit_out,
    parts,
    logits,
    largest,
    temperature,
    target,
    vocabulary,
    row_stride,
    never,
    NUM_TILES: tl.constexpr,
    PADDED: tl.constexpr,
    TILE_SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, PADDED)
    mass = tl.load(parts + row * NUM_TILES + tile, mask=tile < NUM_TILES, other=0.0)
    cumulative, wanted = tl.cumsum(mass, 0), tl.load(target + row)
    found = tl.minimum(tl.sum((cumulative <= wanted).to(tl.int32), 0), NUM_TILES - 1)
    wanted -= tl.sum(tl.where(tile < found, mass, 0.0), 0)
    token = found * TILE_SIZE + tl.arange(0, TILE_SIZE)
    of_row = tl.load(largest + row), tl.load(temperature + row)
    here = _tempered(logits + row * row_stride, token, vocabulary, never, of_row[0], of_row[1])
    within = tl.sum((tl.cumsum(here.to(tl.float64), 0) <= wanted).to(tl.int32), 0)
    # The target may lie behind the last token by rounding: then it is the last one that is possible.
    last = tl.max(tl.where(here > 0, tl.arange(0, TILE_SIZE), 0), 0)
    chosen = found * TILE_SIZE + tl.minimum(within, last)
    tl.store(token_out + row, chosen)
    tl.store(logit_out + row, tl.load(logits + row * row_stride + chosen).to(tl.float32))


def drawn(
    logits: Tensor, parts: Tensor, largest: Tensor, temperature: Tensor, target: Tensor, never: int | None = None
) -> tuple[Tensor, Tensor]:
    """Finds the tile of the target, then the token; the last dimension is contiguous."""
    rows, vocabulary = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    of_tokens = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _drawn[(rows,)](
        tokens,
        of_tokens,
        parts,
        logits,
        largest,
        temperature,
        target,
        vocabulary,
        logits.stride(0),
        -1 if never is None else never,
        NUM_TILES=parts.shape[1],
        PADDED=triton.next_power_of_2(parts.shape[1]),
        TILE_SIZE=TILE,
    )
    return tokens, of_tokens
