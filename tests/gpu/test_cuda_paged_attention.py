"""The denoiser's attention over pages, on a GPU, against xFormers over the same keys and values side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

Oracle = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries (1, S, heads, size), keys and values (1, P + S, heads, size): the output (1, S, heads, size)."""


@contextmanager
def compared(llm: Any, oracle: Oracle, bound: float) -> Iterator[list[int]]:
    """Checks every row of every call of the denoiser's attention layers in the block; collects P + S of each."""
    from engines import runner

    from vllm_twotower.model.denoiser import DenoiserAttention

    lengths: list[int] = []

    def checked(forward: Callable[..., Any]) -> Callable[..., Any]:
        def attend(layer, query, key, value, kv_cache, attn_metadata, output, **options):
            result = forward(layer, query, key, value, kv_cache, attn_metadata, output=output, **options)
            if attn_metadata is not None:
                lengths.extend(_compare(query, kv_cache, attn_metadata, output.view_as(query), oracle, bound))
            return result

        return attend

    with pytest.MonkeyPatch.context() as patch:
        for module in runner(llm).model.modules():
            if isinstance(module, DenoiserAttention):
                patch.setattr(module.attn.impl, "forward", checked(module.attn.impl.forward))
        yield lengths


def _compare(
    query: Tensor, kv_cache: Tensor, metadata: Any, output: Tensor, oracle: Oracle, bound: float
) -> Iterator[int]:
    """``kv_cache`` is vLLM's (pages, KV heads, page size, 2 * size), whichever way it lies in memory."""
    assert not metadata.causal
    bounds = metadata.query_start_loc.tolist()
    for row, length in enumerate(metadata.seq_lens.tolist()):
        of_row = slice(bounds[row], bounds[row + 1])
        if not length or of_row.start == of_row.stop:
            continue
        page_size = kv_cache.shape[2]
        pages = kv_cache[metadata.block_table[row, : -(-length // page_size)].long()]
        side_by_side = pages.transpose(1, 2).flatten(0, 1)[None, :length]
        repeats = query.shape[1] // kv_cache.shape[1]
        keys, values = side_by_side.repeat_interleave(repeats, 2).chunk(2, -1)
        expected = oracle(query[None, of_row], keys.contiguous(), values.contiguous())[0]
        torch.testing.assert_close(output[of_row], expected, atol=bound, rtol=bound)
        yield length


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [pytest.param("float32", 1e-4, id="Triton"), pytest.param("bfloat16", 2e-2, id="FlashAttention")],
)
@pytest.mark.parametrize("name", ["A", "B", "C"])
def test_pages_are_attended_to_as_by_xformers(name: str, dtype: str, bound: float) -> None:
    """Golden runs in one batch: prompts of many lengths, canvases of several widths."""
    xformers = pytest.importorskip("xformers.ops")
    import golden_data
    from engines import run_all, running_engine

    options = {"dtype": dtype, "gpu_memory_utilization": 0.1, "enforce_eager": True}
    runs = golden_data.diffusion_runs(name)
    with (
        running_engine(golden_data.checkpoint(name), **options) as llm,
        compared(llm, xformers.memory_efficient_attention, bound) as lengths,
    ):
        run_all(llm, runs)
    assert len(set(lengths)) > 10
