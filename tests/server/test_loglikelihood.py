"""Log-likelihoods as lm-evaluation-harness asks for them (its model type `local-completions`): echoed prompts."""

from __future__ import annotations

import random
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import pytest
import torch
from answers import expected_answers
from oracle import prompt_logprobs
from serving import Server
from vllm.tokenizers import TokenizerLike

from vllm_twotower.reference import TwoTowerModel

PAIRS = 50
BATCH = 8
SEED = 1234
PIECES = ["the ", "ing ", "over", " an", "count ", "10", "Eur", "a", "Z", "=", "\n", "é", "€", "😀", ". ", "): "]


@dataclass
class Pair:
    """A context and its continuation, as texts and as token ids; ``context_length`` counts tokens."""

    context: str
    continuation: str
    token_ids: list[int]
    context_length: int

    @property
    def text(self) -> str:
        return self.context + self.continuation


@torch.inference_mode()
def likeliest(model: TwoTowerModel, token_ids: list[int]) -> int:
    return int(model.context_logits(torch.tensor([token_ids]))[0, -1].argmax())


def draw_pair(rng: random.Random, model: TwoTowerModel, tokenizer: TokenizerLike, pieces: int) -> Pair:
    """Text of random pieces, split by the harness's rule: the whole is tokenized, then the context alone.

    Every other continuation is what the model finds likeliest, as long as that is text that tokenizes to itself.
    """
    context = "".join(rng.choices(PIECES, k=pieces)).rstrip() or "the"
    continuation = " " + "".join(rng.choices(PIECES, k=rng.randint(1, 6)))
    if rng.random() < 0.5:
        token_ids = tokenizer.encode(context)
        while len(token_ids) < 1100:
            token_ids.append(likeliest(model, token_ids))
            text = tokenizer.decode(token_ids)
            if tokenizer.encode(text) != token_ids or len(text) - len(context) > 4:
                break
            continuation = text.removeprefix(context)
    token_ids = tokenizer.encode(context + continuation)
    return Pair(context, continuation, token_ids, len(tokenizer.encode(context)))


@pytest.fixture(scope="module")
def pairs(oracle: TwoTowerModel, tokenizer: TokenizerLike) -> list[Pair]:
    """Fifty pairs, among them ten longer than a prefill chunk of the server, the longest nearly as long as allowed."""
    rng = random.Random(9)
    lengths = [rng.randint(1, 60) for _ in range(PAIRS - 10)] + [rng.randint(260, 420) for _ in range(10)]
    drawn = [draw_pair(rng, oracle, tokenizer, length) for length in lengths]
    assert sum(len(pair.token_ids) > 512 for pair in drawn) >= 8
    assert all(len(pair.token_ids) < 1024 and pair.context_length < len(pair.token_ids) for pair in drawn)
    return drawn


def loglikelihoods(server: Server, prompts: list[Any], context_lengths: list[int], **fields: Any) -> list[tuple]:
    """(sum, whether greedy, by token) of each prompt's continuation, with the harness's request and its reading."""
    payload = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": SEED, "echo": True, **fields}
    response = server.post("/v1/completions", prompt=prompts, **payload)
    assert response.status_code == 200, response.text
    result = []
    choices = sorted(response.json()["choices"], key=itemgetter("index"))
    for choice, start in zip(choices, context_lengths, strict=True):
        # The harness drops the last token, which was generated; with max_tokens=0 there is none.
        end = -1 if payload["max_tokens"] else None
        values = choice["logprobs"]["token_logprobs"][start:end]
        tops = choice["logprobs"]["top_logprobs"][start:end]
        greedy = all(value == max(top.values()) for value, top in zip(values, tops, strict=True))
        result.append((sum(values), greedy, values))
    return result


def reference(model: TwoTowerModel, pair: Pair) -> tuple[float, bool, list[float]]:
    scores = prompt_logprobs(model, pair.token_ids)[pair.context_length - 1 :]
    values = [value for _, value, _ in scores]
    return sum(values), all(rank == 1 for _, _, rank in scores), values


def assert_close(got: list[tuple], want: list[tuple]) -> None:
    for mine, its in zip(got, want, strict=True):
        assert mine[2] == pytest.approx(its[2], abs=1e-4)
        assert mine[0] == pytest.approx(its[0], abs=1e-3)
        assert mine[1] == its[1]


@pytest.mark.parametrize("as_text", [False, True], ids=["token ids", "text"])
def test_as_the_harness_asks(server: Server, oracle: TwoTowerModel, pairs: list[Pair], as_text: bool) -> None:
    want = [reference(oracle, pair) for pair in pairs]
    assert 5 < sum(greedy for _, greedy, _ in want) < 45
    got = []
    for first in range(0, PAIRS, BATCH):
        batch = pairs[first : first + BATCH]
        prompts = [pair.text if as_text else pair.token_ids for pair in batch]
        got += loglikelihoods(server, prompts, [pair.context_length for pair in batch])
    assert_close(got, want)


def test_the_mode_does_not_matter(server: Server, oracle: TwoTowerModel, pairs: list[Pair]) -> None:
    """Prompts are scored by the context tower, whatever would generate after them."""
    some = pairs[::8] + pairs[-2:]
    xargs = {"diffusion_mode": "ar"}
    got = loglikelihoods(server, [p.token_ids for p in some], [p.context_length for p in some], vllm_xargs=xargs)
    assert_close(got, [reference(oracle, pair) for pair in some])


def test_echo_without_generation(server: Server, oracle: TwoTowerModel, pairs: list[Pair]) -> None:
    some = pairs[::8] + pairs[-2:]
    got = loglikelihoods(server, [p.token_ids for p in some], [p.context_length for p in some], max_tokens=0)
    assert_close(got, [reference(oracle, pair) for pair in some])
    response = server.post("/v1/completions", prompt=some[-1].text, echo=True, max_tokens=0, logprobs=0, temperature=0)
    [choice] = response.json()["choices"]
    assert choice["text"] == some[-1].text
    assert len(choice["logprobs"]["tokens"]) == len(some[-1].token_ids)


def test_echoed_prompt_and_what_follows(
    server: Server, oracle: TwoTowerModel, tokenizer: TokenizerLike, pairs: list[Pair]
) -> None:
    """The generated tokens come after the prompt's, with their own log-probabilities; streamed too."""
    pair = pairs[0]
    [want] = expected_answers(
        oracle, tokenizer, pair.token_ids, {"max_tokens": 20, "temperature": 0, "logprobs": 1, "ignore_eos": True}
    )
    want_values = [x for _, x, _ in prompt_logprobs(oracle, pair.token_ids)]
    want_values += [entry[token] for entry, token in zip(want.logprobs, want.token_ids, strict=True)]
    arguments = {
        "model": server.model,
        "prompt": pair.text,
        "echo": True,
        "max_tokens": 20,
        "temperature": 0,
        "logprobs": 1,
        "extra_body": {"ignore_eos": True},
    }
    [choice] = server.openai.completions.create(**arguments).choices
    assert choice.text == pair.text + want.text
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(want_values, abs=1e-3)

    chunks = [event.choices[0] for event in server.openai.completions.create(stream=True, **arguments)]
    assert "".join(chunk.text for chunk in chunks) == choice.text
    assert [x for chunk in chunks for x in chunk.logprobs.token_logprobs] == choice.logprobs.token_logprobs


def test_prompt_of_one_token_has_no_likelihood(server: Server) -> None:
    response = server.post("/v1/completions", prompt=[68], echo=True, max_tokens=0, logprobs=1, temperature=0)
    logprobs = response.json()["choices"][0]["logprobs"]
    assert (logprobs["token_logprobs"], logprobs["top_logprobs"], logprobs["tokens"]) == ([None], [None], ["a"])
