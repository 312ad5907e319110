"""A checkpoint laid out as the released one, under both of its names: the plain model's tokens in every mode."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import released_layout
from engines import generate, running_engine, tokens_of
from oracle import expected
from vllm import SamplingParams

from vllm_twotower import cli
from vllm_twotower.checkpoint import INDEX
from vllm_twotower.reference import TwoTowerModel

PROMPTS = [[5, 6, 7, 8] * 3, list(range(20, 60))]


@pytest.mark.parametrize(("name", "trusted"), [*zip(released_layout.NAMES, (False, True), strict=True)])
def test_every_mode(tmp_path: Path, name: str, trusted: bool, capsys: pytest.CaptureFixture) -> None:
    """With trust_remote_code the configuration is an object of the checkpoint's own class."""
    folder = released_layout.save(tmp_path / name)
    content = (folder / "config.json").read_text()
    assert "Infinity" in content
    assert not json.loads(content).keys() & {"mask_token_id", "canvas_length", "block_size"}
    assert len(set(json.loads((folder / INDEX).read_text())["weight_map"].values())) == 24
    params = [
        SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, extra_args={"diffusion_mode": mode})
        for mode in ("ar", "mask_diffusion", "verified")
    ]
    model = TwoTowerModel.from_pretrained(folder)
    with running_engine(folder, trust_remote_code=trusted) as llm:
        for of_mode in params:
            got = tokens_of(generate(llm, PROMPTS, [of_mode] * len(PROMPTS)))
            assert got == [tuple(expected(model, prompt, of_mode).token_ids) for prompt in PROMPTS]
            assert min(len(set(tokens)) for tokens in got) > 10
    cli.main(["inspect", str(folder)])
    text = capsys.readouterr().out
    assert "52 layers: 23 Mamba-2, 6 attention, 23 mixture of experts" in text
    assert "16 positions, mask token 3" in text
    assert "Every tensor of the TwoTower layout is there, and no other." in text
