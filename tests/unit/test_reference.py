"""The plain PyTorch model against NVIDIA's outputs, and its training forward against its generation."""

from __future__ import annotations

from functools import cache

import golden_data
import numpy as np
import pytest
import torch

from vllm_twotower.reference import TwoTowerModel, generate_ar, generate_mask_diffusion, generate_mock_ar
from vllm_twotower.reference.layers import ssd_scan


@cache
def model(name: str) -> TwoTowerModel:
    return TwoTowerModel.from_pretrained(golden_data.checkpoint(name))


@pytest.mark.parametrize("name", golden_data.CHECKPOINTS)
@pytest.mark.parametrize("kind", ["diffusion", "alt_mask_runs", "eos_runs"])
def test_mask_diffusion_equals_golden(name: str, kind: str) -> None:
    runs = golden_data.diffusion_runs(name, kind)
    assert runs
    for run in runs:
        result = generate_mask_diffusion(
            model(name),
            run.prompt,
            run.max_new_tokens,
            block_size=run.block_size,
            steps=run.steps,
            gamma=run.gamma,
            mask_token_id=run.mask_token_id,
            eos_token_id=run.eos_token_id,
        )
        assert tuple(result.tokens) == run.tokens
        assert result.nfe == run.nfe
        if run.blocks:
            passes = tuple(
                tuple((step.t, tuple(step.canvas_in), tuple(step.canvas_out)) for step in block)
                for block in result.blocks
            )
            assert passes == run.blocks


@pytest.mark.parametrize("name", golden_data.CHECKPOINTS)
def test_ar_and_mock_ar_equal_golden(name: str) -> None:
    for prompt in golden_data.prompts(name):
        assert generate_ar(model(name), prompt["ids"], 32).tokens == prompt["ar"]["new_ids"]
        assert generate_mock_ar(model(name), prompt["ids"], 32).tokens == prompt["mock_ar"]["new_ids"]
        for run in prompt.get("eos_runs", ()):
            if run["mode"] != "mask_diffusion":
                generate = {"ar": generate_ar, "mock_ar": generate_mock_ar}[run["mode"]]
                result = generate(model(name), prompt["ids"], 32, eos_token_id=run["eos_token_id"])
                assert result.tokens == run["new_ids"]


@pytest.mark.parametrize("name", golden_data.CHECKPOINTS)
def test_denoiser_logits_equal_golden(name: str) -> None:
    compared = 0
    for run in golden_data.diffusion_runs(name):
        result = generate_mask_diffusion(
            model(name), run.prompt, 2 * run.block_size, block_size=run.block_size, steps=run.steps, gamma=run.gamma
        )
        for (block, step), expected in golden_data.recorded_logits(name, run).items():
            got = result.blocks[block][step].logits.numpy().copy()
            got[:, run.mask_token_id] = expected[:, run.mask_token_id]  # recorded after its suppression
            np.testing.assert_allclose(got, expected, atol=1e-3, rtol=0)
            compared += 1
    assert compared > 60


@pytest.mark.parametrize("name", golden_data.CHECKPOINTS)
def test_training_forward_equals_generation(name: str) -> None:
    """Blocks at any offset, denoised together, give what a denoiser pass after exactly those tokens gives."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, 320, (2, 75), generator=generator)
    starts = torch.tensor([[0, 1, 16, 37, 75], [3, 32, 33, 64, 60]])
    canvas = torch.randint(3, 320, (2, 5, 16), generator=generator)
    t = torch.rand(2, 5, generator=generator)
    with torch.inference_mode():
        together = model(name).denoise_blocks(tokens, starts, canvas, t)
        for b in range(2):
            for n, start in enumerate(starts[b].tolist()):
                state = model(name).advance_context(tokens[b : b + 1, :start], None)[1] if start else None
                alone = model(name).denoiser_logits(canvas[b, n], state, t[b, n : n + 1])
                torch.testing.assert_close(together[b, n], alone, atol=1e-3, rtol=0)


def test_context_state_is_exact_when_split() -> None:
    tokens = torch.arange(4, 94)[None]
    whole = model("B").context_logits(tokens)[:, -1]
    state = None
    for chunk in tokens.split([1, 3, 40, 46], 1):
        logits, state = model("B").advance_context(chunk, state)
    torch.testing.assert_close(logits, whole, atol=1e-4, rtol=0)


def test_chunked_scan_equals_the_recurrence() -> None:
    generator = torch.Generator().manual_seed(1)
    x, b, c = (torch.randn(2, 70, 3, size, generator=generator) for size in (4, 5, 5))
    dt, a = torch.rand(2, 70, 3, generator=generator), -torch.rand(3, generator=generator)
    state = torch.randn(2, 3, 4, 5, generator=generator)
    y, trace = ssd_scan(x, dt, a, b, c, state)
    for i in range(70):
        torch.testing.assert_close(trace.state_before(torch.tensor([[i], [i]])).squeeze(1), state, atol=1e-4, rtol=1e-4)
        decay = (dt[:, i] * a).exp()[..., None, None]
        state = state * decay + torch.einsum("bn,bnp,bns->bnps", dt[:, i], x[:, i], b[:, i])
        torch.testing.assert_close(y[:, i], torch.einsum("bnps,bns->bnp", state, c[:, i]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(trace.boundaries[:, -1], state, atol=1e-4, rtol=1e-4)
