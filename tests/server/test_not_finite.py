"""Logits that are not finite: their request ends with an error that says so, its neighbours do not notice."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import golden_data
import openai
import pytest
import torch
from serving import Server, running_server, token_request

from vllm_twotower.engine.running_requests import NOT_FINITE
from vllm_twotower.reference import TwoTowerModel, generate_ar, generate_mask_diffusion

PROMPT = list(range(20, 60))
CLEAN = [PROMPT[i:] for i in range(8)]
MODES = ("mask_diffusion", "ar")
COUNTER = "vllm:twotower_num_requests_not_finite_total"


@pytest.fixture(scope="module")
def expected(oracle: TwoTowerModel) -> dict[str, list[list[int]]]:
    """By mode, the answers to the clean prompts."""
    return {
        "mask_diffusion": [generate_mask_diffusion(oracle, prompt, 24).tokens for prompt in CLEAN],
        "ar": [generate_ar(oracle, prompt, 24).tokens for prompt in CLEAN],
    }


@pytest.fixture(scope="module")
def poison(expected: dict[str, list[list[int]]]) -> dict[int, float]:
    """Two tokens that no clean prompt or answer has, and what their embeddings are.

    They are chosen here, as answers differ between processors where two logits nearly tie.
    """
    seen = {token for answers in expected.values() for answer in answers for token in answer}.union(PROMPT)
    return dict(zip((token for token in range(60, 320) if token not in seen), (torch.nan, torch.inf), strict=False))


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory, poison: dict[int, float]) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("poisoned")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        names = [name for name in tensors if name.endswith("embeddings.weight")]
        assert len(names) == 2
        for name in names:
            for token, value in poison.items():
                tensors[name][token] = value

    checkpoint = golden_data.changed_checkpoint(folder / "checkpoint", change)
    options = ("--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "8", "--max-num-batched-tokens", "128")
    # Few pages, so that those of a failed request are soon another's.
    options += ("--kv-cache-memory-bytes", "64M")
    with running_server(checkpoint, folder / "log", *options, "--num-gpu-blocks-override", "24") as server:
        yield server


def tokens(server: Server, prompt: list[int], **options: object) -> list[int]:
    answer = server.openai.completions.create(model=server.model, **token_request(prompt, 24, **options))
    return answer.choices[0].token_ids


def test_failed_requests_and_their_neighbours(
    poisoned: Server, expected: dict[str, list[list[int]]], poison: dict[int, float]
) -> None:
    def fails(mode: str, place: int, token: int) -> None:
        with pytest.raises(openai.InternalServerError, match="not finite"):
            tokens(poisoned, [*PROMPT[:place], token, *PROMPT[place:]], diffusion_mode=mode)

    before = poisoned.metrics()[COUNTER]
    with ThreadPoolExecutor(16) as pool:
        failing = [
            pool.submit(fails, mode, place, token) for place in (1, 20, 39) for token in poison for mode in MODES
        ]
        for mode, answers in expected.items():
            assert (
                list(pool.map(lambda prompt, mode=mode: tokens(poisoned, prompt, diffusion_mode=mode), CLEAN))
                == answers
            )
        for one in failing:
            one.result()
    assert poisoned.metrics()[COUNTER] - before == len(failing)
    assert poisoned.metrics()["vllm:num_requests_running"] == 0
    for mode, answers in expected.items():  # on pages and states that failed requests had
        assert [tokens(poisoned, prompt, diffusion_mode=mode) for prompt in CLEAN] == answers
    assert NOT_FINITE in poisoned.log_text()


def test_streams_and_sampling(poisoned: Server, poison: dict[int, float]) -> None:
    for mode in MODES:
        arguments = token_request([*PROMPT, *poison], 24, diffusion_mode=mode)
        arguments |= {"temperature": 1.0, "seed": 3, "n": 2, "logprobs": 2}
        with pytest.raises(openai.APIError, match="not finite"):
            list(poisoned.openai.completions.create(model=poisoned.model, stream=True, **arguments))
