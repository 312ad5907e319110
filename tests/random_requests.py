"""Random requests with every sampling option, for tests that compare an engine with the oracle or with itself."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from vllm import SamplingParams

from vllm_twotower.trace import LEVELS

VOCABULARY = 320


@dataclass
class RandomRequest:
    """A prompt of token ids and keyword arguments of :class:`SamplingParams`."""

    prompt: list[int]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def mode(self) -> str:
        return self.options["extra_args"].get("diffusion_mode", "mask_diffusion")

    def params(self, tokenizer: Any = None, **overrides: Any) -> SamplingParams:
        """The sampling parameters; with a tokenizer also the token ids of ``bad_words``, which the engine adds."""
        params = SamplingParams(**{**self.options, **overrides})
        if tokenizer is not None:
            params.update_from_tokenizer(tokenizer)
        return params


def draw_prompt(rng: random.Random, lengths: tuple[int, ...] = (1, 2, 3, 16, 17, 40, 130)) -> list[int]:
    return rng.choices(range(4, VOCABULARY), k=rng.choice(lengths))


def draw_block_options(rng: random.Random) -> dict[str, Any]:
    """``extra_args`` of a mask-diffusion request."""
    strategy = rng.choice(("confidence_unmasking", "confidence_unmasking", "posterior", "predict_and_noise"))
    options: dict[str, Any] = {"diffusion_strategy": strategy}
    if rng.random() < 0.5:
        options["diffusion_max_steps"] = rng.choice((*range(1, 17), 24, 32))
    if rng.random() < 0.5:
        options["diffusion_canvas_length"] = rng.randint(1, 16)
    if strategy == "confidence_unmasking":
        options["diffusion_confidence_threshold"] = rng.choice((0.1, 0.3, 0.5, 0.8, 1.0))
    else:
        options["diffusion_noise_schedule"] = rng.choice(("linear", "cosine", "exponential"))
    if strategy == "predict_and_noise":
        options["diffusion_adaptive_unmasking"] = rng.random() < 0.3
        options["diffusion_remasking"] = rng.choice(("confidence", "margin", "random"))
    return options


def draw_draft_options(rng: random.Random) -> dict[str, Any]:
    """``extra_args`` of a verified request."""
    options = draw_block_options(rng) if rng.random() < 0.5 else {}
    options.pop("diffusion_max_steps", None)
    if options.get("diffusion_canvas_length") == 1:
        del options["diffusion_canvas_length"]
    if rng.random() < 0.6:
        options["diffusion_draft_steps"] = rng.choice((1, 2, 2, 3, 5))
    return options


def draw_rules(rng: random.Random) -> dict[str, Any]:
    """Options that change logits; each is drawn now and then."""
    options: dict[str, Any] = {}
    if rng.random() < 0.2:
        options["logit_bias"] = {rng.randrange(4, VOCABULARY): rng.uniform(-6, 6) for _ in range(20)}
    if rng.random() < 0.15:
        options["allowed_token_ids"] = rng.sample(range(2, VOCABULARY), 60)
    if rng.random() < 0.25:
        letters = "abcdefghijklmnopqrstuvwxyz0123456789 "
        options["bad_words"] = ["".join(rng.choices(letters, k=rng.randint(1, 3))).strip() or "x" for _ in range(40)]
    if rng.random() < 0.2:
        options["min_tokens"] = rng.randint(1, 20)
    for name, low, high in (
        ("presence_penalty", -2, 2),
        ("frequency_penalty", -2, 2),
        ("repetition_penalty", 0.6, 1.8),
    ):
        if rng.random() < 0.2:
            options[name] = round(rng.uniform(low, high), 2)
    return options


def draw_request(rng: random.Random, max_tokens: int = 40) -> RandomRequest:
    """A request with a mode, a temperature or none, filters, rules, stops, and at times log-probabilities or a trace.

    It has a seed if it needs one, so that it has one right answer.
    """
    mode = rng.choices(("mask_diffusion", "ar", "verified"), (5, 3, 2))[0]
    extra = draw_block_options(rng) if mode == "mask_diffusion" else {"diffusion_mode": mode}
    if mode == "verified":
        extra |= draw_draft_options(rng)
    options: dict[str, Any] = {"extra_args": extra, "temperature": 0, **draw_rules(rng)}
    if rng.random() < 0.6:
        options |= {"temperature": rng.choice((0.3, 0.7, 1.0, 1.5)), "seed": rng.randrange(2**40)}
        options |= {"top_k": rng.choice((0, 0, 5, 50)), "top_p": rng.choice((1.0, 1.0, 0.9, 0.5))}
        options["min_p"] = rng.choice((0.0, 0.0, 0.05, 0.2))
    elif extra.get("diffusion_remasking") == "random":
        options["seed"] = rng.randrange(2**40)
    options["max_tokens"] = max(rng.randint(1, max_tokens), options.get("min_tokens", 0))
    options["ignore_eos"] = rng.random() < 0.3
    if rng.random() < 0.3:
        options["stop_token_ids"] = rng.sample(range(4, VOCABULARY), 5)
    if rng.random() < 0.3:
        options["logprobs"] = rng.randint(0, 5)
    if rng.random() < 0.15:
        options["prompt_logprobs"] = rng.randint(0, 3)
    if rng.random() < 0.2:
        extra["diffusion_trace"] = rng.choice(LEVELS)
    return RandomRequest(draw_prompt(rng), options)
