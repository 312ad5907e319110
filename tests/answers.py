"""Requests in the words of OpenAI's client, and what the oracle says a server must answer to them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from golden_data import DiffusionRun
from oracle import Expected, expected, prompt_logprobs
from serving import token_request
from vllm import SamplingParams
from vllm.tokenizers import TokenizerLike
from vllm.v1.engine.detokenizer import IncrementalDetokenizer

from vllm_twotower.reference import TwoTowerModel

EOS = 2
LOWEST = -9999.0
"""What vLLM's server makes of log-probabilities below it."""
CLIENT_ARGUMENTS = (
    "frequency_penalty",
    "logit_bias",
    "logprobs",
    "max_tokens",
    "n",
    "presence_penalty",
    "seed",
    "stop",
    "temperature",
    "top_p",
)
"""Sampling parameters that `completions.create` has arguments of its own for; the others go into ``extra_body``."""


@dataclass
class Answer:
    """One choice; ``logprobs`` has the log-probabilities by token id that came with each token."""

    token_ids: list[int]
    text: str
    finish_reason: str | None
    stop_reason: int | str | None
    logprobs: list[dict[int, float]] | None = None

    def in_a_chat(self, top_logprobs: int | None) -> Answer:
        """The same where log-probabilities are a chat's: vLLM gives the token's own, and ``top_logprobs`` in all."""
        if self.logprobs is None or top_logprobs is None:
            return self
        cut = [dict(list(entry.items())[: max(top_logprobs, 1)]) for entry in self.logprobs]
        return replace(self, logprobs=cut)


# Requests


def completion_arguments(prompt: Sequence[int], options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``completions.create`` for keyword arguments of :class:`SamplingParams`.

    ``extra_args`` travels as ``vllm_xargs``; token ids are asked for, also in place of tokens' texts.
    """
    own, extra = _split(options)
    if "logprob_token_ids" in extra:
        own["logprobs"] = len(extra["logprob_token_ids"])
    return {"prompt": list(prompt), **own, "extra_body": extra}


def golden_request(run: DiffusionRun) -> dict[str, Any]:
    """Arguments of ``completions.create`` for a golden run, which its EOS ends if it has one."""
    request = token_request(
        run.prompt,
        run.max_new_tokens,
        diffusion_mode="mask_diffusion",
        diffusion_confidence_threshold=run.gamma,
        diffusion_max_steps=run.steps,
        diffusion_canvas_length=run.block_size,
        diffusion_strategy="confidence_unmasking",
    )
    if run.eos_token_id is not None:
        request["extra_body"]["stop_token_ids"] = [run.eos_token_id]
    return request


def completion_body(prompt: Sequence[int], options: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON body of the same request."""
    arguments = completion_arguments(prompt, options)
    return {**arguments.pop("extra_body"), **arguments}


def chat_arguments(text: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``chat.completions.create``, where the number of log-probabilities has another name."""
    own, extra = _split(options)
    if "logprobs" in own:
        own |= {"logprobs": True, "top_logprobs": own["logprobs"]}
    if "logprob_token_ids" in extra:
        own |= {"logprobs": True, "top_logprobs": len(extra["logprob_token_ids"])}
    return {"messages": [{"role": "user", "content": text}], **own, "extra_body": extra}


def _split(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    own = {name: value for name, value in options.items() if name in CLIENT_ARGUMENTS}
    extra = {name: value for name, value in options.items() if name not in CLIENT_ARGUMENTS}
    if "logit_bias" in own:
        own["logit_bias"] = {str(token): bias for token, bias in own["logit_bias"].items()}
    if "extra_args" in extra:
        extra["vllm_xargs"] = extra.pop("extra_args")
    return own, {**extra, "return_token_ids": True, "return_tokens_as_token_ids": True}


# Answers


def of_completion(choice: Any) -> Answer:
    """A choice of a completion, as an object of OpenAI's client."""
    logprobs = None
    if choice.logprobs is not None:
        logprobs = [{_token_id(name): x for name, x in top.items()} for top in choice.logprobs.top_logprobs]
        sampled = zip(choice.logprobs.tokens, choice.logprobs.token_logprobs, logprobs, strict=True)
        assert all(entry[_token_id(name)] == value for name, value, entry in sampled)
    return Answer(choice.token_ids, choice.text, choice.finish_reason, choice.stop_reason, logprobs)


def of_chat(choice: Any) -> Answer:
    """A choice of a chat."""
    logprobs = None
    if choice.logprobs is not None:
        logprobs = [
            {_token_id(x.token): x.logprob for x in (content, *content.top_logprobs)}
            for content in choice.logprobs.content
        ]
    return Answer(choice.token_ids, choice.message.content, choice.finish_reason, choice.stop_reason, logprobs)


def _token_id(name: str) -> int:
    return int(name.removeprefix("token_id:"))


def put_together(chunks: Iterable[Any]) -> Answer:
    """The streamed choices of one index as one answer."""
    parts = [of_completion(chunk) for chunk in chunks]
    assert all(part.finish_reason is None for part in parts[:-1])
    logprobs = [entry for part in parts for entry in part.logprobs or ()]
    return Answer(
        [token for part in parts for token in part.token_ids],
        "".join(part.text for part in parts),
        parts[-1].finish_reason,
        parts[-1].stop_reason,
        None if parts[-1].logprobs is None else logprobs,
    )


def choices_in(text: str) -> list[Any]:
    """The choices in a JSON text of a completion, as OpenAI's client makes them."""
    return openai.types.Completion.construct(**json.loads(text)).choices


def answers_in(text: str, is_stream: bool) -> list[Answer]:
    """The answers in the body of a response, in the order of their indices."""
    if not is_stream:
        return [of_completion(choice) for choice in choices_in(text)]
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")]
    chunks = [choice for line in lines for choice in choices_in(line)]
    indices = sorted({chunk.index for chunk in chunks})
    return [put_together([chunk for chunk in chunks if chunk.index == i]) for i in indices]


def expected_answers(
    model: TwoTowerModel, tokenizer: TokenizerLike, prompt: Sequence[int], options: Mapping[str, Any], **engine: Any
) -> list[Answer]:
    """What the oracle says of keyword arguments of :class:`SamplingParams`: choice i is that of the seed plus i.

    ``engine`` is the engine's configuration where it is not the oracle's default.
    """
    answers = []
    for i in range(options.get("n", 1)):
        seed = options.get("seed")
        params = SamplingParams(**{**options, "n": 1, "seed": None if seed is None else seed + i})
        params.update_from_tokenizer(tokenizer)
        answers.append(_spelled_out(tokenizer, prompt, params, expected(model, prompt, params, **engine)))
    return answers


def _spelled_out(tokenizer: TokenizerLike, prompt: Sequence[int], params: SamplingParams, result: Expected) -> Answer:
    """The oracle's tokens as vLLM's detokenizer spells them one at a time, up to a stop string."""
    request = SimpleNamespace(
        sampling_params=params, prompt_token_ids=list(prompt), prompt_embeds=None, request_id="expected"
    )
    detokenizer = IncrementalDetokenizer.from_new_request(tokenizer, request)
    finish_reason, stop_reason = result.finish_reason, None
    for number, token in enumerate(result.token_ids, 1):
        ends = result.finish_reason == "stop" and number == len(result.tokens)
        if stop := detokenizer.update([token], ends):
            finish_reason, stop_reason = "stop", stop
            break
        if ends and not (token == EOS and not params.ignore_eos):
            stop_reason = token
    kept = result.tokens[:number]
    logprobs = None
    if params.num_logprobs is not None:
        logprobs = [{x: max(value, LOWEST) for x, value in [(t.id, t.logprob), *t.top]} for t in kept]
    return Answer([t.id for t in kept], detokenizer.output_text, finish_reason, stop_reason, logprobs)


def assert_same(got: Sequence[Answer], want: Sequence[Answer]) -> None:
    """Equal but for log-probabilities, which may differ by rounding."""
    assert [replace(answer, logprobs=None) for answer in got] == [replace(answer, logprobs=None) for answer in want]
    for mine, its in zip(got, want, strict=True):
        assert (mine.logprobs is None) == (its.logprobs is None)
        for x, y in zip(mine.logprobs or (), its.logprobs or (), strict=True):
            assert x == pytest.approx(y, abs=1e-3)


def assert_prompt_logprobs(entries: list[dict | None], model: TwoTowerModel, prompt: Sequence[int], top: int) -> None:
    """``prompt_logprobs`` of a response: nothing for the first token, for the others theirs and the ``top`` best."""
    assert entries[0] is None
    for entry, (token, logprob, rank) in zip(entries[1:], prompt_logprobs(model, prompt), strict=True):
        assert entry[str(token)]["rank"] == rank
        assert entry[str(token)]["logprob"] == pytest.approx(logprob, abs=1e-4)
        assert sorted(x["rank"] for x in entry.values()) == sorted({rank, *range(1, top + 1)})
