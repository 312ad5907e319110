"""A Nemotron-H checkpoint saved by transformers, made a TwoTower, generates in the engine what transformers does."""

from __future__ import annotations

from pathlib import Path

import nemotron_h
import pytest
import torch
from engines import generate, running_engine, tokens_of
from vllm import SamplingParams

from vllm_twotower.conversion import make_two_tower

NUM_TOKENS = 40


@pytest.mark.parametrize("dimensions", [{}, {"n_groups": 1, "num_key_value_heads": 4, "n_routed_experts": 8}])
def test_ar_equals_transformers(tmp_path: Path, dimensions: dict):
    model = nemotron_h.save(tmp_path / "source", **dimensions)
    make_two_tower(tmp_path / "source", tmp_path / "two-tower")
    prompts = [[7 + 3 * i % 300 for i in range(start, start + length)] for start, length in ((0, 1), (5, 9), (40, 70))]
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, extra_args={"diffusion_mode": "ar"})
    with running_engine(tmp_path / "two-tower", skip_tokenizer_init=True, max_model_len=256) as llm:
        got = tokens_of(generate(llm, prompts, [params] * len(prompts)))
    model.generation_config.eos_token_id = None
    for prompt, tokens in zip(prompts, got, strict=True):
        with torch.no_grad():
            expected = model.generate(torch.tensor([prompt]), max_new_tokens=NUM_TOKENS, do_sample=False)
        assert list(tokens) == expected[0, len(prompt) :].tolist()
