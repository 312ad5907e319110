"""Where text and tokens part, streamed and not: stop strings and characters across block borders, stops, counts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from itertools import accumulate
from typing import Any

import pytest
from answers import (
    EOS,
    Answer,
    assert_same,
    completion_arguments,
    expected_answers,
    of_completion,
    put_together,
)
from serving import Server
from vllm.tokenizers import TokenizerLike

from vllm_twotower.reference import TwoTowerModel

REPLACEMENT = "\ufffd"
LETTERS = list(range(4, 98)) + [224] + list(range(260, 320))
"""Tokens that are printable ASCII: every token is text of its own."""
MODES = ("mask_diffusion", "ar")
TRIES = 5


def ask(server: Server, prompt: list[int], options: dict[str, Any]) -> tuple[list[Answer], list[list[Answer]]]:
    """The answers to a request, whole, and the chunks of each when it is streamed; usage figures are checked."""
    arguments = {"model": server.model, **completion_arguments(prompt, options)}
    completion = server.openai.completions.create(**arguments)
    whole = [of_completion(choice) for choice in completion.choices]

    chunks, counted, last_usage = defaultdict(list), defaultdict(int), None
    stream_options = {"include_usage": True, "continuous_usage_stats": True}
    for event in server.openai.completions.create(stream=True, stream_options=stream_options, **arguments):
        if not event.choices:
            last_usage = event.usage
            continue
        [choice] = event.choices
        chunks[choice.index].append(choice)
        counted[choice.index] += len(choice.token_ids)
        usage = event.usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), counted[choice.index])
        assert usage.total_tokens == len(prompt) + counted[choice.index]
    total = sum(len(answer.token_ids) for answer in whole)
    for usage in (completion.usage, last_usage):
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), total)
        assert usage.total_tokens == len(prompt) + total
    assert_same([put_together(chunks[i]) for i in range(len(whole))], whole)
    return whole, [[of_completion(chunk) for chunk in chunks[i]] for i in range(len(whole))]


def prompts() -> Iterator[list[int]]:
    """Prompts to find one among whose answer has some property."""
    return ([68 + i % 26, 224, 4 + i] for i in range(80))


class Case:
    """A prompt, its unstopped answer of letters, and the pieces of text of its tokens.

    ``border`` is where in the text a block of ``width`` tokens ends; the next characters repeat nothing before.
    """

    def __init__(self, model: TwoTowerModel, tokenizer: TokenizerLike, mode: str, width: int | None = None):
        extra = {"diffusion_mode": mode} | ({} if width is None else {"diffusion_canvas_length": width})
        self.options: dict[str, Any] = {
            "max_tokens": 34,
            "temperature": 0,
            "allowed_token_ids": LETTERS,
            "ignore_eos": True,
            "extra_args": extra,
        }
        self.model, self.tokenizer, width = model, tokenizer, width or 16
        border = -(-4 // width) * width
        for self.prompt in prompts():
            [self.plain] = expected_answers(model, tokenizer, self.prompt, self.options)
            self.pieces = [tokenizer.decode([token]) for token in self.plain.token_ids]
            self.border = len("".join(self.pieces[:border]))
            if self.plain.text.index(self.across(1, 1)) == self.border - 1:
                return
        raise AssertionError("no prompt has a stop string at its border")

    def across(self, before: int, after: int) -> str:
        """The text from ``before`` characters before the border to ``after`` characters behind it."""
        return self.plain.text[self.border - before : self.border + after]

    def expected(self, **options: Any) -> list[Answer]:
        return expected_answers(self.model, self.tokenizer, self.prompt, {**self.options, **options})


@pytest.fixture(scope="module")
def case_of(oracle: TwoTowerModel, tokenizer: TokenizerLike) -> Callable[..., Case]:
    return cache(lambda mode, width=None: Case(oracle, tokenizer, mode, width))


@pytest.mark.parametrize("included", [False, True], ids=["excluded", "included"])
@pytest.mark.parametrize(
    ("mode", "width"),
    [("mask_diffusion", 16), ("mask_diffusion", 5), ("mask_diffusion", 1), ("ar", None)],
)
def test_stop_string_across_a_block_border(
    server: Server, case_of: Callable[..., Case], mode: str, width: int | None, included: bool
) -> None:
    """Text is held back while it may be the start of a stop string; the token that completes it is the last one."""
    case = case_of(mode, width)
    for before, after in ((1, 1), (2, 3)):
        stop = case.across(before, after)
        options = {**case.options, "stop": ["never said", stop], "include_stop_str_in_output": included}
        [answer], [chunks] = ask(server, case.prompt, options)
        place = case.plain.text.index(stop)
        assert answer.text == case.plain.text[: place + len(stop) * included]
        assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
        said = [len("".join(case.pieces[: i + 1])) for i in range(len(case.pieces))]
        length = next(i for i, end in enumerate(said, 1) if end >= place + len(stop))
        assert answer.token_ids == case.plain.token_ids[:length]
        if width == 16 and before == 1:
            assert len(chunks) <= 2
            assert any(len(ask(server, case.prompt, options)[1][0]) == 2 for _ in range(TRIES))
    unsaid = {**case.options, "stop": [case.across(2, 2) + REPLACEMENT]}
    [answer], _ = ask(server, case.prompt, unsaid)
    assert answer == case.plain


@pytest.mark.parametrize("mode", MODES)
def test_the_stop_string_that_is_complete_first_counts(server: Server, case_of: Callable[..., Case], mode: str) -> None:
    """Of several in one block, one inside another, one across the border, whatever their order in the list."""
    case = case_of(mode)
    text, border = case.plain.text, case.border
    later, first, around = text[border + 2 : border + 5], text[border - 1 : border + 1], text[border - 2 : border + 2]
    assert text.index(first) == border - 1
    for stops in ([later, around, first], [first, around, later]):
        [answer], _ = ask(server, case.prompt, {**case.options, "stop": stops, "logprobs": 1})
        assert_same([answer], case.expected(stop=stops, logprobs=1))
        assert (answer.text, answer.stop_reason) == (text[: border - 1], first)


@pytest.mark.parametrize("mode", MODES)
def test_stop_strings_wait_for_min_tokens(server: Server, case_of: Callable[..., Case], mode: str) -> None:
    case = case_of(mode)
    stops = sorted(set(case.plain.text))[:3] + [case.plain.text[2]]
    for min_tokens in (5, 16):
        [answer], _ = ask(server, case.prompt, {**case.options, "stop": stops, "min_tokens": min_tokens})
        assert_same([answer], case.expected(stop=stops, min_tokens=min_tokens))
        assert len(answer.token_ids) > min_tokens


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("included", [False, True], ids=["excluded", "included"])
def test_stop_token_in_a_block(server: Server, case_of: Callable[..., Case], mode: str, included: bool) -> None:
    """A stop token is returned; its text only if stop strings are included. The first of several counts."""
    case = case_of(mode)
    tokens = case.plain.token_ids
    firsts = [i for i, token in enumerate(tokens) if token not in tokens[:i]]
    assert firsts[-1] >= 16
    for i in (0, firsts[3], firsts[-1]):
        others = [token for token in tokens[i + 1 :] if token not in tokens[: i + 1]]
        options = {**case.options, "stop_token_ids": [*others, tokens[i]], "include_stop_str_in_output": included}
        [answer], _ = ask(server, case.prompt, options)
        assert answer.token_ids == tokens[: i + 1]
        assert answer.text == "".join(case.pieces[: i + included])
        assert (answer.finish_reason, answer.stop_reason) == ("stop", tokens[i])


@pytest.mark.parametrize("mode", MODES)
def test_eos(server: Server, oracle: TwoTowerModel, tokenizer: TokenizerLike, mode: str) -> None:
    """EOS ends the answer inside a block unless it is ignored; as a stop token it stops all the same."""
    for prompt in prompts():
        options = {
            "max_tokens": 40,
            "temperature": 0,
            "allowed_token_ids": [*LETTERS, EOS],
            "logit_bias": {EOS: 7},
            "extra_args": {"diffusion_mode": mode},
        }
        [stopped] = expected_answers(oracle, tokenizer, prompt, options)
        if 3 < len(stopped.token_ids) < 40 and len(stopped.token_ids) % 16:
            break
    assert (stopped.finish_reason, stopped.stop_reason, stopped.token_ids[-1]) == ("stop", None, EOS)
    [answer], _ = ask(server, prompt, options)
    assert answer == stopped

    [answer], _ = ask(server, prompt, {**options, "ignore_eos": True})
    assert_same([answer], expected_answers(oracle, tokenizer, prompt, {**options, "ignore_eos": True}))
    assert (answer.finish_reason, len(answer.token_ids)) == ("length", 40)
    assert answer.token_ids[: len(stopped.token_ids)] == stopped.token_ids

    for ignored, reason in ((True, EOS), (False, None)):
        [answer], _ = ask(server, prompt, {**options, "ignore_eos": ignored, "stop_token_ids": [EOS]})
        assert (answer.token_ids, answer.finish_reason, answer.stop_reason) == (stopped.token_ids, "stop", reason)


def spelling(tokenizer: TokenizerLike, text: str) -> dict[str, Any]:
    """Options that make any model write ``text``, whose tokens must differ: biases far apart, each good for one use.

    At a threshold of 1 a pass commits one position, of equally certain ones the first.
    """
    tokens = tokenizer.encode(text)
    assert len(set(tokens)) == len(tokens)
    step = 90 / len(tokens)
    return {
        "max_tokens": len(tokens),
        "temperature": 0,
        "allowed_token_ids": tokens,
        "logit_bias": {token: 100 - step * i for i, token in enumerate(tokens)},
        "repetition_penalty": 1e6,
    }


@pytest.mark.parametrize("text", ["é", "€", "😀", "aé", "b€", "c😀"])
@pytest.mark.parametrize("width", [1, 2, 3])
def test_character_whose_bytes_lie_in_two_blocks(
    server: Server, tokenizer: TokenizerLike, text: str, width: int
) -> None:
    tokens = tokenizer.encode(text)
    options = spelling(tokenizer, text)
    options["extra_args"] = {"diffusion_canvas_length": width, "diffusion_confidence_threshold": 1}
    blocks = [*range(width, len(tokens), width), len(tokens)]
    for _ in range(TRIES):
        [answer], [chunks] = ask(server, [5, 60, 7], options)
        assert (answer.token_ids, answer.text) == (tokens, text)
        ends = list(accumulate(len(chunk.token_ids) for chunk in chunks))
        assert set(ends) <= set(blocks)
        for i, (chunk, end) in enumerate(zip(chunks, ends, strict=True)):
            so_far = bytes_of(tokenizer, tokens[:end]).decode(errors="ignore")
            assert "".join(c.text for c in chunks[: i + 1]) == so_far
            assert REPLACEMENT not in chunk.text
        if ends == blocks:  # a busy server puts chunks together
            break
    else:
        pytest.fail(f"no stream had a chunk for each block; the last one had ends at {ends}")

    [answer], [chunks] = ask(server, [5, 60, 7], {**options, "max_tokens": len(tokens) - 1})
    assert answer.text == "".join(chunk.text for chunk in chunks) == text[:-1]


def bytes_of(tokenizer: TokenizerLike, tokens: list[int]) -> bytes:
    """The bytes of tokens of the ByteLevel alphabet."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {chr(b): b for b in printable}
    alphabet |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in printable)}
    return bytes(alphabet[c] for piece in tokenizer.convert_ids_to_tokens(tokens) for c in piece)


@pytest.mark.parametrize("width", [16, 7, 2])
def test_characters_of_two_bytes_in_random_order(
    server: Server, oracle: TwoTowerModel, tokenizer: TokenizerLike, width: int
) -> None:
    """Sound and broken characters mixed: pieces say what the whole says, though a character lies across a border."""
    lead, rest = tokenizer.encode("é")
    split = 0
    for seed in range(12):
        options = {
            "max_tokens": 64,
            "temperature": 2.0,
            "seed": seed,
            "allowed_token_ids": [lead, rest, 68],
            "logit_bias": {68: -3},
            "extra_args": {"diffusion_canvas_length": width},
        }
        [answer], [chunks] = ask(server, [5, 60, 7], options)
        assert_same([answer], expected_answers(oracle, tokenizer, [5, 60, 7], options))
        borders = [answer.token_ids[i - 1 : i + 1] for i in range(width, 64, width)]
        split += borders.count([lead, rest])
        sound = bytes_of(tokenizer, answer.token_ids).decode(errors="replace")
        assert sound.startswith(answer.text)
        assert set(sound.removeprefix(answer.text)) <= {REPLACEMENT}
        assert sum(chunk.text.count("é") for chunk in chunks) == answer.text.count("é")
        if split:
            break
    assert split


def test_grammar_in_a_stream_of_bytes(server: Server, tokenizer: TokenizerLike) -> None:
    """Token by token the characters come whole, each with its last byte."""
    text = "héllo €😀ñ"
    options = {"max_tokens": 40, "temperature": 0, "structured_outputs": {"choice": [text]}}
    [answer], [chunks] = ask(server, [5, 60, 7], {**options, "extra_args": {"diffusion_mode": "ar"}})
    assert answer.text == text
    assert (answer.finish_reason, answer.token_ids[-1]) == ("stop", EOS)
    assert all(REPLACEMENT not in chunk.text for chunk in chunks)
    assert bytes_of(tokenizer, answer.token_ids[:-1]).decode() == text


@pytest.mark.parametrize("mode", MODES)
def test_three_streams_in_one(server: Server, case_of: Callable[..., Case], mode: str) -> None:
    """With n = 3 the chunks of the choices come mixed; each put together is the answer to its own seed."""
    case = case_of(mode)
    options = {**case.options, "temperature": 2.0, "n": 3, "logprobs": 2, "seed": 0}
    texts = [answer.text for answer in case.expected(**options)]
    options["stop"] = next(
        text[i : i + 2] for text in texts for i in range(3, 30) if sum(text[i : i + 2] in other for other in texts) == 1
    )
    want = case.expected(**options)
    assert len({answer.text for answer in want}) == 3
    assert sorted(answer.finish_reason for answer in want) == ["length", "length", "stop"]
    answers, _ = ask(server, case.prompt, options)
    assert_same(answers, want)
