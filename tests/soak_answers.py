"""When two answers to one request are the same: equal but for log-probabilities, which may differ by rounding.

A decision closer than the rounding of matrix products, which depends on the batch, can fall either way. That this is
why two answers differ is shown, not assumed: the plain model must give both of them when its logits are changed by no
more than rounding does.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from answers import expected_answers
from random_requests import RandomRequest
from vllm.tokenizers import TokenizerLike

from vllm_twotower.reference import TwoTowerModel

TOLERANCE = 1e-4
"""Largest difference of two log-probabilities that is rounding."""
NOISE = 3e-5
"""Largest change of a logit that is rounding."""
TRIES = 32

Answers = dict[str, Any]
"""As JSON: ``choices`` are :class:`answers.Answer` objects, ``prompt_logprobs`` those of the response."""
Ask = Callable[[RandomRequest], Awaitable[Answers]]


def as_json(choices: Sequence[Any], prompt_logprobs: Any = None) -> Answers:
    """Answers as they come out of a file."""
    return json.loads(json.dumps({"choices": [asdict(x) for x in choices], "prompt_logprobs": prompt_logprobs}))


@dataclass
class Comparison:
    """What differs between two answers beyond rounding.

    ``swapped`` counts tokens that are not listed, or have another rank, because of others as probable.
    """

    different: list[str] = field(default_factory=list)
    swapped: int = 0
    largest: float = 0.0
    """Difference of two log-probabilities of the same token, among those within rounding."""

    def of(self, got: Answers, want: Answers) -> Comparison:
        for mine, its in zip(got["choices"], want["choices"], strict=True):
            self.different += [name for name in mine if name != "logprobs" and mine[name] != its[name]]
            self._lists("logprobs", mine["logprobs"], its["logprobs"])
        self._lists("prompt_logprobs", got["prompt_logprobs"], want["prompt_logprobs"])
        return self

    def _lists(self, name: str, mine: list | None, its: list | None) -> None:
        if (mine is None) != (its is None) or len(mine or ()) != len(its or ()):
            self.different.append(name)
            return
        if not all(self.entries(a, b) for a, b in zip(mine or (), its or (), strict=True)):
            self.different.append(name)

    def entries(self, mine: Mapping[str, Any] | None, its: Mapping[str, Any] | None) -> bool:
        """Whether the log-probabilities reported with a token are the same up to rounding."""
        if not mine or not its:
            return mine == its
        a, b = ({token: _value(x) for token, x in entry.items()} for entry in (mine, its))
        pairs = [(a[token], b[token]) for token in a.keys() & b.keys()]
        # Of those that are listed on one side only, others must be as probable.
        others = [sorted(x[token] for token in x.keys() - y.keys()) for x, y in ((a, b), (b, a))]
        if len(others[0]) != len(others[1]):
            return False
        largest = max(abs(x - y) for x, y in [*pairs, *zip(*others, strict=True)])
        if largest > TOLERANCE:
            return False
        self.largest = max(self.largest, largest)
        self.swapped += len(others[0]) + sum(_rank(mine[x]) != _rank(its[x]) for x in a.keys() & b.keys())
        return True


def _value(entry: float | Mapping[str, Any]) -> float:
    return entry["logprob"] if isinstance(entry, Mapping) else entry


def _rank(entry: float | Mapping[str, Any]) -> int | None:
    return entry["rank"] if isinstance(entry, Mapping) else None


async def compare(request: RandomRequest, got: Answers, ask: Ask) -> tuple[Comparison, Answers | None]:
    """Compares with what ``ask`` says, which is returned too; an ``auto`` request's text with that of either mode."""
    comparison = Comparison()
    if request.mode == "auto" and "structured_outputs" not in request.options:
        if not await _is_of_either_mode(request, got["choices"][0], ask, comparison):
            comparison.different.append("no choice of modes gives this text")
        return comparison, None
    want = await ask(request)
    return comparison.of(got, want), want


async def _is_of_either_mode(request: RandomRequest, got: dict[str, Any], ask: Ask, comparison: Comparison) -> bool:
    """Whether a text is made of blocks that either mode gives as the first one after the text before them.

    The engine chooses the mode where a block ends, after a preemption also after a single token.
    """
    tokens, extra = got["token_ids"], request.options["extra_args"]
    width, max_tokens = extra.get("diffusion_canvas_length", 16), request.options["max_tokens"]

    async def agreeing(start: int, extra_args: dict[str, Any]) -> tuple[int, bool]:
        """How many tokens from ``start`` on a mode gives too, and whether that is all of its block."""
        options = {**request.options, "max_tokens": min(width, max_tokens - start), "extra_args": extra_args}
        [block] = (await ask(RandomRequest(request.prompt + tokens[:start], options)))["choices"]
        count = 0
        for token, mine in zip(block["token_ids"], tokens[start:], strict=False):
            if token != mine or not (
                got["logprobs"] is None or comparison.entries(got["logprobs"][start + count], block["logprobs"][count])
            ):
                break
            count += 1
        is_whole = count == len(block["token_ids"])
        if start + count == len(tokens):
            is_whole &= all(block[name] == got[name] for name in ("finish_reason", "stop_reason"))
            count -= not is_whole
        return count, is_whole

    to_try, tried = [0], set()
    while to_try:
        start = to_try.pop()
        if start == len(tokens):
            return True
        if start not in tried:
            tried.add(start)
            count, _ = await agreeing(start, {"diffusion_mode": "ar"})
            to_try += range(start + 1, start + count + 1)
            count, is_whole = await agreeing(start, {**extra, "diffusion_mode": "mask_diffusion"})
            if is_whole:
                to_try.append(start + count)
    return False


class RoundingJudge:
    """Says whether an answer is that of the plain model but for rounding."""

    def __init__(self, model: TwoTowerModel, tokenizer: TokenizerLike):
        self._model, self._tokenizer = model, tokenizer

    async def explains(self, request: RandomRequest, got: Answers) -> bool:
        """Whether the plain model, its logits changed by at most ``NOISE``, gives these choices in one of ``TRIES``."""
        if request.options.keys() & {"structured_outputs", "repetition_detection"}:
            return False  # the plain model has neither
        for seed in range(TRIES):
            shaken = _Shaken(self._model, seed)

            async def ask(asked: RandomRequest, model: Any = shaken) -> Answers:
                return as_json(expected_answers(model, self._tokenizer, asked.prompt, asked.options))

            comparison, _ = await compare(request, {**got, "prompt_logprobs": None}, ask)
            if not comparison.different:
                return True
        return False


class _Shaken:
    """A model whose logits are changed a little, otherwise with every seed; not at all with seed 0."""

    def __init__(self, model: TwoTowerModel, seed: int):
        self._generator = torch.Generator().manual_seed(seed)
        self._model, self._noise = model, NOISE if seed else 0.0
        self.lm_head = model.lm_head

    def _shake(self, logits: torch.Tensor) -> torch.Tensor:
        return logits + self._noise * (2 * torch.rand(logits.shape, generator=self._generator) - 1)

    def advance_context(self, *args: Any) -> tuple[torch.Tensor, Any]:
        logits, state = self._model.advance_context(*args)
        return self._shake(logits), state

    def denoiser_logits(self, *args: Any) -> torch.Tensor:
        return self._shake(self._model.denoiser_logits(*args))
