"""The requests of a soak: each a function of a seed and its index."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from answers import completion_body
from bad_requests import BAD_FIELDS, BAD_OPTIONS
from random_requests import VOCABULARY, RandomRequest, draw_block_options, draw_request

MAX_MODEL_LEN = 1024
PAGE = 128
"""Tokens of a page of checkpoint A in fp32."""
STAYS, LEAVES, IS_BAD = "stays", "leaves", "is bad"
NEEDS_TEXT = ("presence_penalty", "frequency_penalty", "bad_words", "min_tokens")
"""Rules that depend on where the returned text begins."""

GRAMMARS: list[dict[str, Any]] = [
    {"regex": "[a-f]{3,12}x"},
    {"regex": "(ab|cd)+[0-9]{2}"},
    {"regex": r"[A-Z][a-z]{1,8}( [a-z]{1,8}){0,4}\."},
    {"regex": "[0-9]{1,30}"},
    {"choice": ["yes", "no", "perhaps"]},
    {"choice": ["a" * n for n in (1, 5, 20)]},
    {"json": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}},
    {"json": {"type": "array", "items": {"enum": ["x", "yy", "zzz"]}, "maxItems": 4}},
    {"grammar": 'root ::= "(" root ")" | "z"'},
    {"grammar": 'root ::= [a-c] ("+" [a-c])*'},
]


@dataclass
class Asked:
    """A request, what its client does, and the body it sends.

    A client that leaves does so ``patience`` seconds after it has asked, unless it has its answer by then. The message
    that refuses a bad request has all ``words``. With a ``follow_up`` the client asks once more, for what comes after
    the prompt, the answer and these tokens; only that answer is looked at.
    """

    client: str
    body: dict[str, Any]
    request: RandomRequest | None = None
    patience: float | None = None
    words: tuple[str, ...] = ()
    follow_up: list[int] | None = None


def draw_asked(seed: int, index: int) -> Asked:
    """One request in ten is bad, and of one in ten the client leaves."""
    rng = random.Random(f"{seed}/{index}")
    chance = rng.random()
    if chance < 0.1:
        return _draw_bad(rng)
    request = _draw_sound(rng)
    client, patience = STAYS, None
    if chance < 0.2:
        request.options["max_tokens"] = min(rng.randint(60, 300), MAX_MODEL_LEN - len(request.prompt))
        client, patience = LEAVES, rng.choice((0.02, 0.2, 2.0)) * rng.random()
    follow_up = None
    if client == STAYS and rng.random() < 0.15 and not request.options.keys() & {"n", "structured_outputs"}:
        # The answer fills the prompt's last page, so that the next turn can find it.
        request.prompt = rng.choices(range(4, VOCABULARY), k=PAGE * rng.randint(1, 2) - rng.randint(0, 24))
        request.options["max_tokens"] += 16
        follow_up = rng.choices(range(4, VOCABULARY), k=rng.randint(1, 40))
    body = completion_body(request.prompt, request.options)
    if "prompt_logprobs" not in request.options and rng.random() < 0.4:
        body["stream"] = True
        if rng.random() < 0.3:
            body["stream_options"] = {"include_usage": True}
    return Asked(client, body, request, patience, follow_up=follow_up)


def _draw_bad(rng: random.Random) -> Asked:
    name, value, words = rng.choice(
        [("vllm_xargs", {name: value}, (name, str(value))) for name, value in BAD_OPTIONS] + BAD_FIELDS
    )
    body = completion_body(_draw_prompt(rng), {"max_tokens": 48, "temperature": 0})
    return Asked(IS_BAD, {**body, name: value}, words=words)


def _draw_prompt(rng: random.Random) -> list[int]:
    """A third of the prompts begin as others do, with up to two pages."""
    length = rng.choice((1, 2, 3, 16, 17, 40, 130))
    if rng.random() < 0.35:
        stem = rng.choice((128, 140, 200, 256, 300))
        length = rng.randint(0, 40)
        return random.Random(stem).choices(range(4, VOCABULARY), k=stem) + rng.choices(range(4, VOCABULARY), k=length)
    return rng.choices(range(4, VOCABULARY), k=length)


def _draw_sound(rng: random.Random) -> RandomRequest:
    request = draw_request(rng, max_tokens=rng.choices((20, 150), (19, 1))[0])
    request.prompt, options = _draw_prompt(rng), request.options
    if options["temperature"] and rng.random() < 0.2:
        options["n"] = rng.randint(2, 3)
    if rng.random() < 0.2:
        options["stop"] = ["".join(rng.choices("abehinort m=]N0", k=rng.randint(1, 2))) for _ in range(3)]
        options["include_stop_str_in_output"] = rng.random() < 0.5
    if rng.random() < 0.2:
        options["skip_special_tokens"] = False
    if rng.random() < 0.1:
        options.pop("logprobs", None)
        options["logprob_token_ids"] = rng.sample(range(VOCABULARY), rng.randint(1, 5))
    if rng.random() < 0.03:
        options["repetition_detection"] = {"max_pattern_size": 4, "min_count": 3}
    kind = rng.random()
    if kind < 0.12:
        _make_auto(rng, options)
    elif kind < 0.2:
        _make_structured(rng, options)
    elif kind < 0.22:
        room = max(rng.randint(1, 40), options.get("min_tokens", 0))
        request.prompt = rng.choices(range(4, VOCABULARY), k=MAX_MODEL_LEN - room)
        options["max_tokens"] = room
    return request


def _make_auto(rng: random.Random, options: dict[str, Any]) -> None:
    """Without options under which a text goes on otherwise than the same text at the end of a prompt."""
    for name in (*NEEDS_TEXT, "n", "stop", "include_stop_str_in_output", "repetition_detection", "prompt_logprobs"):
        options.pop(name, None)
    extra = draw_block_options(rng)
    if extra.get("diffusion_canvas_length") == 1:
        del extra["diffusion_canvas_length"]
    if extra.get("diffusion_remasking") == "random":
        options.setdefault("seed", rng.randrange(2**40))
    options["extra_args"] = {**extra, "diffusion_mode": "auto"}
    options["max_tokens"] = max(options["max_tokens"], 20)


def _make_structured(rng: random.Random, options: dict[str, Any]) -> None:
    """With a grammar, and without what could forbid all that it allows."""
    for name in ("stop_token_ids", "ignore_eos", *NEEDS_TEXT, "allowed_token_ids"):
        options.pop(name, None)
    options["structured_outputs"] = rng.choice(GRAMMARS)
    options["extra_args"] = {"diffusion_mode": rng.choice(("ar", "auto"))}
