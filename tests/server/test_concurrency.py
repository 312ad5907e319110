"""Thirty-two clients at once, a quarter of which go away: the others get their exact tokens, and nothing remains."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from typing import Any

import openai
import pytest
from serving import Server, token_request, wait_until

from vllm_twotower.reference import TwoTowerModel, generate_ar, generate_mask_diffusion

CLIENTS = 32
COUNTERS = ("num_denoising_steps", "num_canvas_positions", "num_committed_tokens")


@dataclass
class Client:
    """What one client asks for, and how: ``whole``, ``stream``, or going away by ``close`` or ``cancel``."""

    prompt: list[int]
    max_tokens: int
    manner: str
    options: dict[str, Any] = field(default_factory=dict)

    def request(self) -> dict[str, Any]:
        return token_request(self.prompt, self.max_tokens, **self.options)

    def expected(self, model: TwoTowerModel) -> list[int]:
        if self.options.get("diffusion_mode") == "ar":
            return generate_ar(model, self.prompt, self.max_tokens).tokens
        return generate_mask_diffusion(
            model,
            self.prompt,
            self.max_tokens,
            block_size=self.options.get("diffusion_canvas_length", 16),
            steps=self.options.get("diffusion_max_steps", 16),
            gamma=self.options.get("diffusion_confidence_threshold", 0.8),
        ).tokens


def draw_clients(seed: int) -> list[Client]:
    rng = random.Random(seed)
    clients = []
    for i in range(CLIENTS):
        leaves = i % 4 == 0
        manner = rng.choice(("close", "cancel") if leaves else ("whole", "stream"))
        options: dict[str, Any] = {"diffusion_mode": "ar"}
        if rng.random() < 0.7:
            options = {
                "diffusion_canvas_length": rng.randint(1, 16),
                "diffusion_max_steps": rng.randint(1, 16),
                "diffusion_confidence_threshold": rng.choice((0.3, 0.6, 0.8, 0.95, 1)),
            }
        prompt = rng.choices(range(4, 320), k=rng.choice((1, 2, 3, 17, 50, 130, 300)))
        # Those who leave ask for more than can be ready before they do.
        clients.append(Client(prompt, 600 if leaves else rng.randint(1, 80), manner, options))
    rng.shuffle(clients)
    return clients


async def use(client: Client, api: openai.AsyncOpenAI, model: str) -> list[int]:
    """The tokens the client got."""
    request = client.request()
    if client.manner == "whole":
        [choice] = (await api.completions.create(model=model, **request)).choices
        return choice.token_ids
    tokens: list[int] = []
    async with await api.completions.create(model=model, stream=True, **request) as events:
        async for event in events:
            for choice in event.choices:
                tokens += choice.token_ids
            if client.manner == "close":
                break
            if client.manner == "cancel":
                asyncio.current_task().cancel()
                await asyncio.sleep(0)  # where the cancellation arrives
    return tokens


async def use_all(clients: list[Client], server: Server) -> list[Any]:
    async with server.async_openai() as api:
        uses = (use(client, api, server.model) for client in clients)
        return await asyncio.wait_for(asyncio.gather(*uses, return_exceptions=True), timeout=300)


@pytest.mark.parametrize("seed", range(2))
def test_all_who_stay_get_their_exact_tokens(server: Server, oracle: TwoTowerModel, seed: int) -> None:
    clients = draw_clients(seed)
    before = server.metrics()
    results = asyncio.run(use_all(clients, server))

    aborted = 0
    for client, result in zip(clients, results, strict=True):
        if client.manner == "cancel":
            assert isinstance(result, asyncio.CancelledError)
        elif client.manner == "close":
            assert 0 < len(result) < client.max_tokens
        else:
            assert result == client.expected(oracle)
        aborted += client.manner in ("close", "cancel")
    assert aborted == CLIENTS // 4

    wait_until(lambda: is_idle(server.metrics()), "no request running or waiting, no page in use")
    request = token_request([5, 6, 7], 20)
    [choice] = server.openai.completions.create(model=server.model, **request).choices
    assert choice.token_ids == generate_mask_diffusion(oracle, [5, 6, 7], 20).tokens
    wait_until(lambda: is_idle(server.metrics()), "no request running or waiting, no page in use")
    after = server.metrics()
    for name in COUNTERS:
        counter = f"vllm:diffusion_{name}_total"
        assert after[counter] > before.get(counter, 0)


def is_idle(metrics: dict[str, float]) -> bool:
    return not any(
        metrics[name] for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    )


def test_one_request_counts_exactly(server: Server, oracle: TwoTowerModel) -> None:
    """The figures of one request alone: passes, positions looked at, tokens that came out."""
    wait_until(lambda: is_idle(server.metrics()), "no request running or waiting, no page in use")
    before = server.metrics()
    server.openai.completions.create(model=server.model, **token_request([5, 6, 7], 48))
    expected = generate_mask_diffusion(oracle, [5, 6, 7], 48)

    def grown() -> list[float]:
        now = server.metrics()
        return [now[f"vllm:diffusion_{name}_total"] - before[f"vllm:diffusion_{name}_total"] for name in COUNTERS]

    wait_until(lambda: is_idle(server.metrics()), "no request running or waiting, no page in use")
    assert grown() == [expected.nfe, 16 * expected.nfe, 48]
