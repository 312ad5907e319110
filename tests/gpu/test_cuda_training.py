"""Training's ways of attention on a GPU: gradients as those of dense in fp32, and memory; skipped without CUDA."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from vllm_twotower.reference.layers import BlockAttention, dense_attention, dense_blocks
from vllm_twotower.training.attention import flex_blocks, xformers_blocks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

WIDTH, HEADS, KV_HEADS, SIZE = 16, 4, 2, 64


@pytest.fixture(autouse=True, scope="module")
def without_tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def draw_inputs(batch: int, rows: int, length: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values, with gradients."""
    shapes = ((batch, rows, HEADS, SIZE), *[(batch, length + rows, KV_HEADS, SIZE)] * 2)
    generator = torch.Generator("cuda").manual_seed(1)
    return [torch.randn(s, generator=generator, device="cuda", dtype=dtype).requires_grad_() for s in shapes]


def draw_starts(batch: int, blocks: int, length: int) -> Tensor:
    """Anywhere, in any order; the first at 0 and the last at the end."""
    starts = torch.randint(0, length + 1, (batch, blocks), generator=torch.Generator().manual_seed(0))
    starts[0, 0], starts[-1, -1] = 0, length
    return starts.cuda()


@pytest.mark.parametrize(("batch", "blocks", "length"), [(2, 5, 75), (2, 20, 256), (1, 100, 1000)])
@pytest.mark.parametrize("name", ["flex", "xformers"])
def test_gradients_are_those_of_dense_in_fp32(name: str, batch: int, blocks: int, length: int) -> None:
    """xFormers has no merged attention in fp32: it gets the same numbers in bf16, and may round as bf16 does."""
    if name == "xformers":
        pytest.importorskip("xformers")
    way, dtype, bound = {
        "flex": (flex_blocks, torch.float32, 1e-4),
        "xformers": (xformers_blocks, torch.bfloat16, 2e-2),
    }[name]
    starts = draw_starts(batch, blocks, length)
    inputs = draw_inputs(batch, blocks * WIDTH, length, dtype)
    in_fp32 = [x.detach().float().requires_grad_() for x in inputs]
    weights = torch.randn_like(in_fp32[0]).to(dtype)
    output, expected = way(starts, WIDTH, length)(*inputs), dense_blocks(starts, WIDTH, length)(*in_fp32)
    output.backward(weights)
    expected.backward(weights.float())
    pairs = [(output, expected), *((x.grad, y.grad) for x, y in zip(inputs, in_fp32, strict=True))]
    for mine, of_dense in pairs:
        assert (mine.float() - of_dense).norm() < bound * of_dense.norm()


def in_steps(way: BlockAttention, length: int, dtype: torch.dtype) -> Callable[[], None]:
    """Attention forward and backward of one sequence, blocks of 16 as long as itself together."""
    starts = draw_starts(1, length // WIDTH, length)

    def step() -> None:
        inputs = draw_inputs(1, length, length, dtype)
        way(starts, WIDTH, length)(*inputs).square().sum().backward()

    return step


def peak(step: Callable[[], None]) -> int:
    """Bytes allocated at most, after a step that compiles."""
    step()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("name", ["flex", "xformers"])
def test_8192_tokens_fit_where_dense_does_not(name: str) -> None:
    if name == "xformers":
        pytest.importorskip("xformers")
    way = {"flex": flex_blocks, "xformers": xformers_blocks}[name]
    half, whole = (peak(in_steps(way, length, torch.bfloat16)) for length in (4096, 8192))
    of_dense = peak(in_steps(dense_blocks, 8192, torch.bfloat16))
    print(f"{name}: {half / 2**20:.0f} MiB, {whole / 2**20:.0f} MiB; dense {of_dense / 2**20:.0f} MiB")
    assert whole < 2.5 * half
    assert whole < of_dense
    gc.collect()
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved() + (whole + of_dense) // 2
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    try:
        in_steps(way, 8192, torch.bfloat16)()
        with pytest.raises(torch.OutOfMemoryError):
            in_steps(dense_blocks, 8192, torch.bfloat16)()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_the_context_tower_is_linear(dtype: torch.dtype) -> None:
    def in_step(length: int) -> Callable[[], None]:
        return lambda: partial(dense_attention, is_causal=True)(*draw_inputs(1, length, 0, dtype)).sum().backward()

    half, whole = (peak(in_step(length)) for length in (8192, 16384))
    assert whole < 2.5 * half
