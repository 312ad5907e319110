"""`vllm serve` on a checkpoint laid out as the released one, whole and with the denoiser's files deleted."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
import released_layout
from oracle import expected
from serving import Server, running_server
from vllm import SamplingParams
from vllm.tokenizers import get_tokenizer

from vllm_twotower.reference import TwoTowerModel

PROMPT = "Question: What is 7 + 5?"
OPTIONS = ("--dtype", "float32", "--max-model-len", "1024", "--kv-cache-memory-bytes", "64M")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return released_layout.save(tmp_path / "nvidia" / released_layout.NAMES[1], remote_tokenizer=True)


def text_of(server: Server, **options: str) -> str:
    asked = {"prompt": PROMPT, "max_tokens": 20, "temperature": 0, "ignore_eos": True, "vllm_xargs": options}
    answer = server.post("/v1/completions", **asked)
    assert answer.status_code == httpx.codes.OK, answer.text
    return answer.json()["choices"][0]["text"]


def test_served_whole_and_without_denoiser(folder: Path, tmp_path: Path) -> None:
    tokenizer, model = get_tokenizer(str(folder), trust_remote_code=True), TwoTowerModel.from_pretrained(folder)
    assert type(tokenizer).__name__.endswith("TwoTowerTokenizer")
    texts = {}
    for mode in ("mask_diffusion", "ar"):
        params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, extra_args={"diffusion_mode": mode})
        texts[mode] = tokenizer.decode(expected(model, tokenizer.encode(PROMPT), params).token_ids)
    with running_server(folder, tmp_path / "whole.log", "--trust-remote-code", *OPTIONS) as server:
        assert text_of(server) == texts["mask_diffusion"]
        assert text_of(server, diffusion_mode="ar") == texts["ar"]

    released_layout.delete_denoiser(folder)
    with running_server(folder, tmp_path / "context.log", "--trust-remote-code", *OPTIONS) as server:
        assert "The context tower is served alone" in server.log_text()
        assert text_of(server) == texts["ar"]
        refused = server.post("/v1/completions", prompt=PROMPT, vllm_xargs={"diffusion_mode": "verified"})
        assert refused.status_code == httpx.codes.BAD_REQUEST
        assert "diffusion_mode='verified': needs the denoiser" in refused.json()["error"]["message"]
