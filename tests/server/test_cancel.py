"""Clients that go away at every phase of a request, whatever they asked for: nothing of it remains."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import golden_data
import pytest
from answers import completion_arguments
from serving import Server, token_request, wait_until

from vllm_twotower.reference import TwoTowerModel, generate_mask_diffusion

MODES = ("mask_diffusion", "ar")
SEATS = 32
"""Requests that the server runs at once."""
RUNNING, WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"
CONTEXT_PASSES = "vllm:twotower_num_context_passes_total"
DENOISER_PASSES = "vllm:diffusion_num_denoising_steps_total"
COMMITTED, GENERATED = "vllm:diffusion_num_committed_tokens_total", "vllm:generation_tokens_total"
PROMPT_TOKENS = "vllm:prompt_tokens_total"

# What a cancelled request may have pending besides its tokens; grammars are for the autoregressive modes.
PENDING: list[dict[str, Any]] = [
    {},
    {"logprobs": 5},
    {"prompt_logprobs": 2},
    {"logprob_token_ids": [5, 3, 319], "prompt_logprobs": 0},
    {"temperature": 1.0, "seed": 1, "n": 3, "logprobs": 0},
    {"presence_penalty": 1.0, "bad_words": ["ab", "the"], "min_tokens": 90, "stop": ["never said"]},
    {"structured_outputs": {"regex": "[a-z ]{700}"}, "logprobs": 1},
    {"structured_outputs": {"choice": ["b" * 700]}, "prompt_logprobs": 0},
]

TRIES = 20
Metrics = dict[str, float]


def requests(mode: str, count: int, prompt_length: int) -> list[dict[str, Any]]:
    """Long requests of a mode, with something of ``PENDING`` in turn; blocks take sixteen passes."""
    pending = [x for x in PENDING if mode != "mask_diffusion" or "structured_outputs" not in x]
    extra = {"diffusion_mode": mode}
    if mode == "mask_diffusion":
        extra["diffusion_confidence_threshold"] = 1
    rng = random.Random(prompt_length)
    base = {"temperature": 0, "max_tokens": 1000 - prompt_length, "ignore_eos": True, "extra_args": extra}
    return [
        completion_arguments(rng.choices(range(4, 320), k=prompt_length), {**base, **pending[i % len(pending)]})
        for i in range(count)
    ]


class Clients:
    """Clients in one event loop, every fourth streaming if it may; ``received`` counts the chunks of each."""

    def __init__(self, server: Server, asked: list[dict[str, Any]]):
        self.server, self.asked = server, asked
        self.received = [0] * len(asked)
        self.tasks: list[asyncio.Task] = []

    def start(self, api: Any, which: slice = slice(None)) -> None:
        indices = range(len(self.asked))[which]
        self.tasks += [asyncio.create_task(self._use(api, i)) for i in indices]

    def streams(self, index: int) -> bool:
        """vLLM does not stream log-probabilities of prompts."""
        return index % 4 == 0 and not self.asked[index]["extra_body"].get("prompt_logprobs")

    async def _use(self, api: Any, index: int) -> None:
        arguments = {"model": self.server.model, **self.asked[index]}
        if not self.streams(index):
            await api.completions.create(**arguments)
            self.received[index] += 1
            return
        async with await api.completions.create(stream=True, **arguments) as events:
            async for _ in events:
                self.received[index] += 1

    async def until(self, reached: Callable[[Metrics], bool], what: str) -> None:
        """Waits for a state of the server's metrics; fails if a client is refused."""
        await asyncio.to_thread(wait_until, lambda: reached(self.server.metrics()), what)
        for task in self.tasks:
            if task.done():
                task.result()

    async def leave(self, which: slice = slice(None)) -> None:
        leaving = self.tasks[which]
        for task in leaving:
            task.cancel()
        results = await asyncio.gather(*leaving, return_exceptions=True)
        assert all(result is None or isinstance(result, asyncio.CancelledError) for result in results), results
        del self.tasks[which]


def is_idle(metrics: Metrics) -> bool:
    return not any(metrics[name] for name in (RUNNING, WAITING, "vllm:kv_cache_usage_perc"))


async def leave_at(
    server: Server, asked: list[dict[str, Any]], moment: Callable[[Metrics, Metrics], bool], phase: Callable[..., bool]
) -> bool:
    """Clients that all leave at a ``moment``; whether the server was then in a ``phase``.

    Both are told from its metrics before and now. A look at them may come too late.
    """
    before, seen, clients = server.metrics(), {}, Clients(server, asked)

    def has_come(now: Metrics) -> bool:
        seen.update(now)
        return moment(before, now)

    async with server.async_openai() as api:
        clients.start(api)
        await clients.until(has_come, "the moment to leave")
        await clients.leave()
    await asyncio.to_thread(wait_until, lambda: is_idle(server.metrics()), "the server is idle")
    return phase(before, seen)


def assert_nothing_remains(server: Server, oracle: TwoTowerModel, log_start: int) -> None:
    """No request, no page; requests of every mode are answered exactly, and the log tells of no error."""
    wait_until(lambda: is_idle(server.metrics()), "no request running or waiting, no page in use")

    def tokens(request: dict[str, Any]) -> list[int]:
        return server.openai.completions.create(model=server.model, **request).choices[0].token_ids

    assert tokens(token_request([5, 6, 7], 20)) == generate_mask_diffusion(oracle, [5, 6, 7], 20).tokens
    golden = golden_data.prompts("A")[2]
    run = golden["ar"]
    assert tokens(token_request(golden["ids"], run["max_new_tokens"], diffusion_mode="ar")) == run["new_ids"]
    wait_until(lambda: is_idle(server.metrics()), "no request running or waiting, no page in use")
    log = server.log_text()[log_start:]
    assert "Traceback" not in log
    assert " ERROR " not in log


@pytest.fixture(autouse=True)
def nothing_remains(server: Server, oracle: TwoTowerModel) -> Any:
    """Before each of these tests the server is idle, and after it too."""
    log_start = len(server.log_text())
    wait_until(lambda: is_idle(server.metrics()), "no request running or waiting, no page in use")
    yield
    assert_nothing_remains(server, oracle, log_start)


@pytest.mark.parametrize("mode", MODES)
def test_while_waiting_and_between_blocks(server: Server, mode: str) -> None:
    """Those who wait for a seat leave first; those who have one go on, and leave when their streams have begun."""

    async def run() -> None:
        # One seat is one completion; those with n = 3 take three.
        runners = [x for x in requests(mode, 2 * SEATS, 20) if "n" not in x][:SEATS]
        clients = Clients(server, [*runners, *requests(mode, 16, 30)])
        async with server.async_openai() as api:
            clients.start(api, slice(SEATS))
            await clients.until(lambda now: now[RUNNING] == SEATS, "all seats taken")
            clients.start(api, slice(SEATS, None))
            await clients.until(lambda now: now[WAITING] >= 16, "the others wait")
            await clients.leave(slice(SEATS, None))
            await clients.until(lambda now: (now[RUNNING], now[WAITING]) == (SEATS, 0), "nobody waits")
            assert not any(clients.received[SEATS:])
            streams = [i for i in range(SEATS) if clients.streams(i)]
            await clients.until(lambda _: all(clients.received[i] > 1 for i in streams), "streams have begun")
            await clients.leave()

    asyncio.run(run())


@pytest.mark.parametrize("mode", MODES)
def test_during_the_chunks_of_long_prompts(server: Server, mode: str) -> None:
    """Thirty prompts of 900 tokens take more than fifty steps to read, two or three each."""
    asked = requests(mode, 30, 900)

    def begins(before: Metrics, now: Metrics) -> bool:
        return now[CONTEXT_PASSES] > before[CONTEXT_PASSES]

    def reads(before: Metrics, now: Metrics) -> bool:
        return now[PROMPT_TOKENS] - before[PROMPT_TOKENS] < 29 * 900

    assert any(asyncio.run(leave_at(server, asked, begins, reads)) for _ in range(TRIES))


def test_between_the_passes_of_the_first_block(server: Server) -> None:
    """Blocks take sixteen passes, slow ones beside the chunks of long prompts."""
    asked = requests("mask_diffusion", 4, 10) + requests("mask_diffusion", 20, 600)

    def begins(before: Metrics, now: Metrics) -> bool:
        return now[DENOISER_PASSES] > before[DENOISER_PASSES]

    def has_no_block(before: Metrics, now: Metrics) -> bool:
        return now[COMMITTED] == before[COMMITTED]

    assert any(asyncio.run(leave_at(server, asked, begins, has_no_block)) for _ in range(TRIES))


@pytest.mark.parametrize("mode", MODES)
def test_after_a_random_number_of_chunks(server: Server, mode: str) -> None:
    """Clients leave one after the other while the rest goes on, most of them in the middle of a block."""

    async def run() -> None:
        clients = Clients(server, requests(mode, 24, 40))
        rng, before = random.Random(1), server.metrics()
        async with server.async_openai() as api:
            clients.start(api)
            await clients.until(lambda now: now[GENERATED] > before[GENERATED], "tokens come")
            while clients.tasks:
                place = rng.randrange(len(clients.tasks))
                await clients.leave(slice(place, place + 1))
                await asyncio.sleep(rng.choice((0, 0.01, 0.05)))

    asyncio.run(run())


def test_while_the_grammar_is_being_made(server: Server) -> None:
    """A choice of four hundred long sentences, new ones each time, takes a while; meanwhile its request waits."""
    rng = random.Random(0)

    def ask() -> dict[str, Any]:
        sentences = ["".join(rng.choices("abcdefgh ", k=300)) for _ in range(400)]
        options = {
            "temperature": 0,
            "max_tokens": 900,
            "structured_outputs": {"choice": sentences},
            "prompt_logprobs": 0,
            "extra_args": {"diffusion_mode": "ar"},
        }
        return completion_arguments([5, 6, 7], options)

    def arrives(before: Metrics, now: Metrics) -> bool:
        return now[WAITING] > 0 or now[RUNNING] > 0

    def waits(before: Metrics, now: Metrics) -> bool:
        return (now[WAITING], now[RUNNING]) == (1, 0)

    assert any(asyncio.run(leave_at(server, [ask()], arrives, waits)) for _ in range(TRIES))
