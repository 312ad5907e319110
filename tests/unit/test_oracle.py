"""The oracle of the sampling options: against the plain generators, NVIDIA's records, and cases decided by hand."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import golden_data
import pytest
import torch
from oracle import Expected, expected, prompt_logprobs
from torch import Tensor
from vllm import SamplingParams

from vllm_twotower.kernels import uniform
from vllm_twotower.reference import TwoTowerModel, generate_ar, generate_mask_diffusion

MASK, EOS, VOCABULARY = 3, 2, 24
STRATEGIES = ("confidence_unmasking", "posterior", "predict_and_noise")
SCHEDULES = ("linear", "cosine", "exponential")
PROMPT = (5, 17, 40, 8, 120)


@cache
def model() -> TwoTowerModel:
    return TwoTowerModel.from_pretrained(golden_data.checkpoint("A"))


class Recorder:
    """Passes calls on to a model and keeps every denoiser pass: canvas, t, and logits (S, V)."""

    def __init__(self, inner: Any):
        self.inner, self.lm_head = inner, inner.lm_head
        self.passes: list[tuple[list[int], float | None, Tensor]] = []

    def advance_context(self, tokens: Tensor, past: Any) -> tuple[Tensor, Any]:
        return self.inner.advance_context(tokens, past)

    def denoiser_logits(self, canvas: Tensor, context: Any, t: Tensor | None) -> Tensor:
        logits = self.inner.denoiser_logits(canvas, context, t)
        self.passes.append((canvas.tolist(), None if t is None else float(t), logits))
        return logits

    @property
    def masks(self) -> list[int]:
        """The number of masked positions before every pass."""
        return [canvas.count(MASK) for canvas, _, _ in self.passes]


class Scripted:
    """Stands in for a model: the logits (V,) of every absolute position are given, whatever the tokens are."""

    lm_head = SimpleNamespace(weight=torch.zeros(0))

    def __init__(self, logits_at: Callable[[int], Tensor]):
        self.logits_at = logits_at

    def advance_context(self, tokens: Tensor, past: int | None) -> tuple[Tensor, int]:
        length = (past or 0) + tokens.shape[1]
        return self.logits_at(length)[None], length

    def denoiser_logits(self, canvas: Tensor, context: int | None, t: Tensor | None) -> Tensor:
        start = (context or 0) + (t is None)  # without t the canvas is the last token, and the logits are of the next
        return torch.stack([self.logits_at(start + i) for i in range(len(canvas))])


def scripted(*positions: dict[int, float], rest: dict[int, float] | None = None) -> Recorder:
    """Probabilities of tokens at the positions 1, 2, ... and after them; other tokens share what is left."""

    def logits_at(position: int) -> Tensor:
        given = positions[position - 1] if position <= len(positions) else rest or {4: 0.9}
        others = (1 - sum(given.values())) / (VOCABULARY - len(given) - 1)
        probabilities = torch.full((VOCABULARY,), max(others, 1e-30))
        probabilities[MASK] = 1e-30
        for token, probability in given.items():
            probabilities[token] = probability
        return probabilities.log()

    return Recorder(Scripted(logits_at))


def params(bad_words: Sequence[list[int]] = (), **options: Any) -> SamplingParams:
    """Sampling parameters, greedy unless told; ``diffusion_*`` go to the extra arguments."""
    extra = {name: options.pop(name) for name in list(options) if name.startswith("diffusion_")}
    result = SamplingParams(**{"temperature": 0.0, "max_tokens": 48, "extra_args": extra, **options})
    result._bad_words_token_ids = list(bad_words) or None
    return result


def in_a_row(result: Expected, word: list[int]) -> bool:
    ids = result.token_ids
    return any(ids[i : i + len(word)] == word for i in range(len(ids)))


# Against the plain generators and the golden records


@pytest.mark.parametrize("kind", ["diffusion", "alt_mask_runs", "eos_runs"])
def test_mask_diffusion_equals_golden(kind: str) -> None:
    for run in golden_data.diffusion_runs("A", kind):
        result = expected(
            model(),
            run.prompt,
            params(
                max_tokens=run.max_new_tokens,
                diffusion_canvas_length=run.block_size,
                diffusion_max_steps=run.steps,
                diffusion_confidence_threshold=run.gamma,
            ),
            eos_token_id=run.eos_token_id,
            mask_token_id=run.mask_token_id,
        )
        assert tuple(result.token_ids) == run.tokens
        assert result.nfe == run.nfe
        assert result.finish_reason == ("stop" if run.eos_token_id in run.tokens else "length")


def test_ar_equals_golden() -> None:
    options = params(max_tokens=32, diffusion_mode="ar")
    for prompt in golden_data.prompts("A"):
        result = expected(model(), prompt["ids"], options, eos_token_id=None)
        assert result.token_ids == prompt["ar"]["new_ids"]
        assert (result.nfe, result.blocks) == (0, 0)
        for run in prompt.get("eos_runs", ()):
            if run["mode"] == "ar":
                eos = run["eos_token_id"]
                assert expected(model(), prompt["ids"], options, eos_token_id=eos).token_ids == run["new_ids"]


@pytest.mark.parametrize("length", [1, 7, 33])
def test_default_options_equal_the_plain_generators(length: int) -> None:
    prompt = torch.randint(4, 320, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    blocks = generate_mask_diffusion(model(), prompt, 40, eos_token_id=EOS)
    result = expected(model(), prompt, params(max_tokens=40, logprobs=3))
    assert (result.token_ids, result.nfe, result.blocks) == (blocks.tokens, blocks.nfe, len(blocks.blocks))
    again = expected(model(), prompt, params(max_tokens=40, diffusion_mode="ar"))
    assert again.token_ids == generate_ar(model(), prompt, 40, eos_token_id=EOS).tokens

    # Log-probabilities are those of the pass that committed the token.
    for i, token in enumerate(result.tokens):
        block, column = blocks.blocks[i // 16], i % 16
        step = next(step for step in block if step.canvas_out[column] != MASK)
        logits = step.logits[column].clone()
        logits[MASK] = -1e12
        best = logits.log_softmax(-1).topk(3)
        assert token.rank == 1
        assert token.logprob == pytest.approx(float(best.values[0]), abs=1e-6)
        assert token.top == [(int(i), pytest.approx(float(x), abs=1e-6)) for x, i in zip(*best, strict=True)]


def test_prompt_logprobs_are_those_of_the_context_head() -> None:
    with torch.inference_mode():
        logprobs = model().context_logits(torch.tensor([PROMPT]))[0].log_softmax(-1)
    got = prompt_logprobs(model(), PROMPT)
    assert [token for token, _, _ in got] == list(PROMPT[1:])
    for i, (token, logprob, rank) in enumerate(got):
        assert logprob == pytest.approx(float(logprobs[i, token]), abs=1e-6)
        assert logprobs[i].sort(descending=True).indices[rank - 1] == token


# Where generation ends


@pytest.mark.parametrize("mode", ["mask_diffusion", "ar"])
def test_generation_ends_at_stops_and_lengths(mode: str) -> None:
    text = scripted({10: 0.9}, {11: 0.9}, {EOS: 0.9}, {12: 0.9}, {13: 0.9}, {14: 0.9}, rest={15: 0.9})

    def ends(max_model_len: int = 1024, **options: Any) -> tuple[list[int], str]:
        result = expected(text, [9], params(diffusion_mode=mode, **options), max_model_len=max_model_len)
        return result.token_ids, result.finish_reason

    assert ends() == ([10, 11, EOS], "stop")
    assert ends(max_tokens=3) == ([10, 11, EOS], "stop")
    assert ends(max_tokens=2) == ([10, 11], "length")
    assert ends(stop_token_ids=[11]) == ([10, 11], "stop")
    assert ends(ignore_eos=True, stop_token_ids=[13]) == ([10, 11, EOS, 12, 13], "stop")
    assert ends(ignore_eos=True, max_tokens=20) == ([10, 11, EOS, 12, 13, 14] + [15] * 14, "length")
    assert ends(max_model_len=3) == ([10, 11], "length")
    assert ends(max_model_len=30, max_tokens=None, ignore_eos=True)[0] == [10, 11, EOS, 12, 13, 14] + [15] * 23
    banned = ends(min_tokens=4, stop_token_ids=[13])
    assert banned[1] == "stop"
    assert banned[0][3:] == [12, 13]
    assert EOS not in banned[0]
    # An EOS that only the waiver lets through does not count before min_tokens.
    assert ends(min_tokens=5, max_tokens=5, allowed_token_ids=[EOS]) == ([10, 11, EOS, 12, 13], "length")


def test_the_last_canvas_is_as_wide_as_the_room_left() -> None:
    recorder = Recorder(model())
    result = expected(recorder, PROMPT, params(max_tokens=None), max_model_len=40, eos_token_id=None)
    assert (len(result.tokens), result.blocks, result.finish_reason) == (35, 3, "length")
    assert {len(canvas) for canvas, _, _ in recorder.passes} == {16, 3}
    assert len(recorder.passes) == result.nfe


# Rules


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rules_hold_in_the_output(strategy: str, temperature: float) -> None:
    def run(**options: Any) -> Expected:
        options = params(diffusion_strategy=strategy, temperature=temperature, seed=1, max_tokens=32, **options)
        return expected(model(), PROMPT, options, eos_token_id=None)

    free = run().token_ids
    allowed = [7, 8, 9, 200, 201]
    assert set(run(allowed_token_ids=allowed).token_ids) <= set(allowed)
    assert set(run(logit_bias={77: 100.0}).token_ids) == {77}
    assert free[3] not in run(logit_bias={free[3]: -100.0}).token_ids
    late = run(stop_token_ids=free, min_tokens=20)
    assert not set(late.token_ids[:20]) & set(free)
    assert len(late.token_ids) >= 20

    words = [[token] for token in free[:4]] + [list(pair) for pair in pairwise(free[4:])]
    words += [list(pair) for pair in pairwise(allowed)]  # so that a word often stands in the way
    for result in (run(bad_words=words), run(bad_words=words, logit_bias=dict.fromkeys(allowed, 20.0))):
        assert len(result.tokens) == 32
        assert not [word for word in words if in_a_row(result, word)]


def test_rules_hold_in_autoregressive_output() -> None:
    def run(**options: Any) -> Expected:
        return expected(model(), PROMPT, params(diffusion_mode="ar", max_tokens=16, **options), eos_token_id=None)

    free = run().token_ids
    words = [[free[0]]] + [list(pair) for pair in pairwise(free[1:])]
    result = run(bad_words=words)
    assert not [word for word in words if in_a_row(result, word)]
    late = run(stop_token_ids=free, min_tokens=8)
    assert not set(late.token_ids[:8]) & set(free)
    assert len(set(run(presence_penalty=2.0, logit_bias=dict.fromkeys(range(50, 70), 50.0)).token_ids)) > 8


def near_ties() -> Recorder:
    """Every position prefers token 10, then 11, ... to 19, at logits 5, 4.9, ...; all others are far below."""
    logits = torch.full((VOCABULARY,), -20.0)
    logits[10:20] = 5 - 0.1 * torch.arange(10)
    return Recorder(Scripted(lambda position: logits))


@pytest.mark.parametrize("mode", ["mask_diffusion", "ar"])
def test_penalties_count_tokens_decided_so_far(mode: str) -> None:
    one_by_one: dict[str, Any] = {"max_tokens": 16}
    if mode == "mask_diffusion":
        one_by_one["diffusion_confidence_threshold"] = 1.0

    def counts(prompt: Sequence[int] = (9,), **options: Any) -> dict[int, int]:
        sampling = params(diffusion_mode=mode, **{**one_by_one, **options})
        return Counter(expected(near_ties(), prompt, sampling).token_ids)

    assert counts() == {10: 16}
    assert counts(frequency_penalty=1.0) == {**dict.fromkeys(range(10, 16), 2), **dict.fromkeys(range(16, 20), 1)}
    # Once all ten are in use the presence penalty no longer tells them apart.
    assert counts(presence_penalty=1.0) == {10: 7, **dict.fromkeys(range(11, 20), 1)}
    assert counts(repetition_penalty=2.0) == {10: 7, **dict.fromkeys(range(11, 20), 1)}
    # The prompt counts for the repetition penalty alone.
    nine = {**one_by_one, "max_tokens": 9}
    assert counts(prompt=(10, 10), **nine, repetition_penalty=2.0) == dict.fromkeys(range(11, 20), 1)
    assert counts(prompt=(10, 10), **nine, presence_penalty=1.0) == dict.fromkeys(range(10, 19), 1)
    assert counts(prompt=(10, 10), **nine, frequency_penalty=1.0) == dict.fromkeys(range(10, 19), 1)


def test_repetition_penalty_moves_negative_logits_down() -> None:
    logits = torch.full((VOCABULARY,), -20.0)
    logits[10], logits[11] = -1.0, -1.5
    result = expected(
        Scripted(lambda position: logits), [10], params(repetition_penalty=2.0, max_tokens=1, diffusion_mode="ar")
    )
    assert result.token_ids == [11]


def test_bad_words_across_a_block_border() -> None:
    text = scripted(*[{12: 0.95}] * 15, {7: 0.95}, {8: 0.5, 9: 0.4}, rest={12: 0.95})
    assert in_a_row(expected(text, [5], params()), [7, 8])
    result = expected(text, [5], params(bad_words=[[7, 8]]))
    assert result.token_ids[14:18] == [12, 7, 9, 12]
    assert len(result.tokens) == 48


def test_bad_words_see_the_tokens_behind_them_but_not_the_prompt() -> None:
    text = scripted({7: 0.6, 9: 0.3}, {8: 0.95})
    assert expected(text, [7], params(max_tokens=2)).token_ids == [7, 8]
    assert expected(text, [7], params(max_tokens=2, bad_words=[[7, 8]])).token_ids == [9, 8]  # 8 stood there first
    assert expected(scripted({8: 0.95}), [7], params(max_tokens=1, bad_words=[[7, 8]])).token_ids == [8]


def test_bad_words_of_one_pass_keep_their_most_confident_token() -> None:
    text = scripted({7: 0.85, 11: 0.1}, {8: 0.95}, {9: 0.9}, rest={4: 0.95})
    assert text.passes == []
    assert expected(text, [5], params(max_tokens=3)).token_ids == [7, 8, 9]
    assert text.masks == [16]
    text.passes.clear()
    assert expected(text, [5], params(max_tokens=3, bad_words=[[7, 8, 9]])).token_ids == [11, 8, 9]
    # Both less confident ones are taken back; the next pass predicts them again, both: the better one stays.
    assert text.masks == [16, 2, 1]
    text.passes.clear()
    one_pass = params(max_tokens=3, bad_words=[[7, 8, 9]], diffusion_max_steps=1)
    assert expected(text, [5], one_pass).token_ids == [11, 8, 9]  # passes go on after the last step
    assert text.masks == [16, 2, 1]


def test_overlapping_bad_words_are_judged_on_the_same_state() -> None:
    text = scripted({7: 0.85, 11: 0.1}, {8: 0.9, 11: 0.05}, {9: 0.95}, rest={4: 0.99})
    result = expected(text, [5], params(max_tokens=3, diffusion_max_steps=1, bad_words=[[7, 8], [8, 9]]))
    # 7 gives way to 8 and 8 to 9 in the first pass; then 8 is forbidden and 7 harmless.
    assert result.token_ids == [7, 11, 9]
    assert text.masks == [16, 2]


def test_rules_that_leave_nothing_are_waived() -> None:
    text = scripted({7: 0.9}, {8: 0.9}, rest={4: 0.9})
    result = expected(text, [5], params(max_tokens=2, allowed_token_ids=[8], bad_words=[[8]]))
    assert result.token_ids == [7, 8]
    # A waived position may complete a bad word; the block ends all the same.
    words = [[7, token] for token in range(VOCABULARY)]
    result = expected(text, [5], params(max_tokens=2, bad_words=words, logit_bias={7: 50.0, 8: 50.0}))
    assert len(result.tokens) == 2


# Random draws


def test_draws_invert_the_filtered_distribution() -> None:
    logits = torch.full((VOCABULARY,), -math.inf)
    logits[10:14] = torch.tensor([0.3, 0.05, 0.5, 0.15]).log()
    text = Scripted(lambda position: logits)
    kept = {
        "min_p": (0.2, [10, 12, 13]),
        "top_k": (2, [10, 12]),
        "top_p": (0.75, [10, 12]),
        "temperature": (0.5, [10, 11, 12, 13]),
    }
    for name, (value, tokens) in kept.items():
        options = {"temperature": 1.0, name: value}
        weights = [float(logits[token].exp()) ** (1 / options["temperature"]) for token in tokens]
        for seed in range(10):
            for mode in ("mask_diffusion", "ar"):
                one_pass = {"diffusion_max_steps": 1} if mode == "mask_diffusion" else {}
                sampling = params(seed=seed, max_tokens=3, diffusion_mode=mode, logprobs=4, **one_pass, **options)
                result = expected(text, [5, 6], sampling, logprobs_mode="processed_logprobs")
                for i, token in enumerate(result.tokens):
                    counters = (2, 0, i) if mode == "mask_diffusion" else (2 + i, 0, 0)
                    target = float(uniform(torch.tensor(seed), *map(torch.tensor, counters))) * sum(weights)
                    assert token.id == next(t for j, t in enumerate(tokens) if sum(weights[: j + 1]) > target)
                    finite = {token: logprob for token, logprob in token.top if logprob > -math.inf}
                    logprobs = [math.log(weight / sum(weights)) for weight in weights]
                    assert finite == pytest.approx(dict(zip(tokens, logprobs, strict=True)), abs=1e-5)
                    assert token.logprob == finite[token.id]
                    assert [x for _, x in token.top] == sorted((x for _, x in token.top), reverse=True)
                    assert token.top[token.rank - 1][0] == token.id


def test_filters_apply_in_order() -> None:
    """Top-k works on what min-p leaves, top-p on what top-k leaves."""
    text = scripted(*[{10: 0.4, 11: 0.3, 12: 0.2}] * 16)
    for options, kept in [
        ({"top_k": 2, "top_p": 0.55}, {10}),  # 0.4 and 0.3 become 0.57 and 0.43
        ({"top_p": 0.55}, {10, 11}),
        ({"min_p": 0.6, "top_k": 3}, {10, 11}),
    ]:
        tokens = set()
        for seed in range(5):
            tokens |= set(expected(text, [5], params(temperature=1.0, seed=seed, max_tokens=16, **options)).token_ids)
        assert tokens == kept


def test_logprobs_are_raw_or_processed() -> None:
    text = scripted({10: 0.5, 11: 0.3, 12: 0.15})
    options = {"max_tokens": 1, "logprob_token_ids": [12, 10], "bad_words": [[10]]}
    (raw,) = expected(text, [5], params(**options)).tokens
    assert (raw.id, raw.rank) == (11, 2)
    assert raw.logprob == pytest.approx(math.log(0.3), abs=1e-5)
    assert raw.top == [(12, pytest.approx(math.log(0.15), abs=1e-5)), (10, pytest.approx(math.log(0.5), abs=1e-5))]
    (processed,) = expected(text, [5], params(**options), logprobs_mode="processed_logprobs").tokens
    assert (processed.id, processed.rank) == (11, 1)
    assert processed.logprob == pytest.approx(math.log(0.3 / 0.5), abs=1e-5)
    assert processed.top == [(12, pytest.approx(math.log(0.15 / 0.5), abs=1e-5)), (10, -math.inf)]
    (plain,) = expected(text, [5], params(max_tokens=1)).tokens
    assert plain.top == []
    (all_of_them,) = expected(text, [5], params(max_tokens=1, logprobs=-1)).tokens
    assert sum(math.exp(logprob) for _, logprob in all_of_them.top) == pytest.approx(1, abs=1e-5)


def test_confidence_is_under_the_rules_but_neither_tempered_nor_filtered() -> None:
    text = scripted(*[{7: 0.7, 8: 0.2}] * 16)

    def passes(**options: Any) -> int:
        return expected(text, [5], params(seed=1, max_tokens=16, **options)).nfe

    assert passes() == 16
    assert passes(temperature=0.01) == passes(temperature=1.0, top_k=1) == 16
    assert passes(bad_words=[[8]]) == 1  # 0.7 of 0.8 is above the threshold


def test_only_blocks_suppress_the_mask_token() -> None:
    logits = torch.zeros(VOCABULARY)
    logits[MASK], logits[7] = 9, 5
    text = Scripted(lambda position: logits)
    for mode, token in {"mask_diffusion": 7, "ar": MASK}.items():
        result = expected(text, [5], params(max_tokens=2, diffusion_mode=mode))
        assert result.token_ids == [token, token]
        assert result.tokens[0].logprob == pytest.approx(
            9 - math.log(math.exp(9) + math.exp(5) + 22)
            if mode != "mask_diffusion"
            else 5 - math.log(math.exp(5) + 22),
            abs=1e-5,
        )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_seeded_run_repeats(strategy: str) -> None:
    def run(seed: int | None, fallback: int | None = None) -> Expected:
        options = params(temperature=1.0, seed=seed, max_tokens=32, diffusion_strategy=strategy)
        return expected(model(), PROMPT, options, seed=fallback)

    first = run(5)
    assert run(5) == run(None, 5) == run(5 + 2**63) == first
    assert run(5, 6) == first
    assert run(6).token_ids != first.token_ids
    with pytest.raises(ValueError, match="seed"):
        run(None)


# Strategies


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "strategy",
    [
        {"diffusion_strategy": "posterior"},
        {"diffusion_strategy": "predict_and_noise"},
        {"diffusion_strategy": "predict_and_noise", "diffusion_remasking": "margin"},
        {"diffusion_strategy": "predict_and_noise", "diffusion_remasking": "random"},
        {"diffusion_strategy": "predict_and_noise", "diffusion_adaptive_unmasking": True},
    ],
)
def test_strategies_fill_every_block_in_time(strategy: dict[str, Any], temperature: float, schedule: str) -> None:
    for steps in (1, 6):
        recorder = Recorder(model())
        options = params(
            temperature=temperature,
            seed=3,
            max_tokens=32,
            diffusion_max_steps=steps,
            diffusion_noise_schedule=schedule,
            **strategy,
        )
        result = expected(recorder, PROMPT, options, eos_token_id=None)
        assert len(result.tokens) == 32
        assert result.blocks == 2
        assert result.nfe == len(recorder.passes) <= 2 * steps
        assert MASK not in result.token_ids
        for (before, t, _), (after, next_t, _) in pairwise(recorder.passes):
            if after.count(MASK) < 16:  # the same block: nothing decided changes, time runs
                assert before.count(MASK) > after.count(MASK)
                assert all(b in (MASK, a) for b, a in zip(before, after, strict=True))
                assert next_t < t


@pytest.mark.parametrize(
    ("options", "masks"),
    [
        ({}, [16, 12, 8, 4]),
        ({"diffusion_noise_schedule": "cosine"}, [16, 9, 4, 1]),
        ({"diffusion_noise_schedule": "exponential"}, [16, 15, 13, 8]),
        ({"diffusion_adaptive_unmasking": True}, [16, 15, 14, 7]),
        ({"diffusion_canvas_length": 2}, [2, 1]),  # at least one is committed in every pass
    ],
)
def test_predict_and_noise_follows_the_schedule(options: dict[str, Any], masks: list[int]) -> None:
    text = scripted()
    options = params(max_tokens=2, diffusion_max_steps=4, diffusion_strategy="predict_and_noise", **options)
    expected(text, [5], options)
    assert text.masks == masks
    times = [1 - step * (1 - 1e-5) / 4 for step in range(len(masks))]
    if options.extra_args.get("diffusion_noise_schedule") == "cosine":
        times = [1 - math.cos(math.pi * t / 2) for t in times]
    elif options.extra_args.get("diffusion_noise_schedule") == "exponential":
        times = [1 - (math.exp(-3 * t) - math.exp(-3)) / (1 - math.exp(-3)) for t in times]
    assert [t for _, t, _ in text.passes] == pytest.approx(times, abs=1e-6)


@pytest.mark.parametrize("strategy", ["posterior", "predict_and_noise"])
def test_time_stands_still_after_the_last_step(strategy: str) -> None:
    text = scripted({7: 0.85, 11: 0.1}, {8: 0.95}, {9: 0.9}, rest={4: 0.95})
    options = params(max_tokens=3, bad_words=[[7, 8, 9]], diffusion_max_steps=1, diffusion_strategy=strategy)
    assert expected(text, [5], options).token_ids == [11, 8, 9]
    assert [(canvas.count(MASK), t) for canvas, t, _ in text.passes] == [(16, 1), (2, 1), (1, 1)]


def test_predict_and_noise_ranks_positions_by_its_score() -> None:
    text = scripted({7: 0.5, 8: 0.45}, {7: 0.4}, {7: 0.3}, {7: 0.4})

    def first_committed(remasking: str) -> list[int]:
        text.passes.clear()
        options = params(
            max_tokens=1,
            seed=11,
            diffusion_max_steps=4,
            diffusion_canvas_length=4,
            diffusion_strategy="predict_and_noise",
            diffusion_remasking=remasking,
        )
        expected(text, [5], options)
        return [next(i for i in range(4) if b[i] != a[i]) for (b, _, _), (a, _, _) in pairwise(text.passes)]

    assert first_committed("confidence") == [0, 1, 3]
    assert first_committed("margin") == [1, 3, 2]
    order, left = [], [0, 1, 2, 3]
    for step in range(3):
        scores = {i: float(uniform(*map(torch.tensor, (11, 1, step, i, 1)))) for i in left}
        order.append(max(left, key=scores.__getitem__))
        left.remove(order[-1])
    assert first_committed("random") == order


def test_posterior_is_one_pass_for_a_linear_schedule_without_temperature() -> None:
    """The odds of a step stay below one until the last, so no probability outweighs them."""
    recorder = Recorder(model())
    result = expected(recorder, PROMPT, params(max_tokens=32, diffusion_strategy="posterior"), eos_token_id=None)
    assert (result.nfe, result.blocks) == (2, 2)
    predictions = [logits.index_fill(1, torch.tensor(MASK), -1e12).argmax(-1) for _, _, logits in recorder.passes]
    assert result.token_ids == torch.cat(predictions).tolist()
    assert [t for _, t, _ in recorder.passes] == [1, 1]


def test_posterior_without_temperature_commits_what_outweighs_the_schedule() -> None:
    steps, committed, waited, reused = 8, 0, 0, 0
    alphas = [math.cos(math.pi * (1 - step * (1 - 1e-5) / steps) / 2) for step in range(steps)]

    def due(step: int, probability: float) -> bool:
        rate = (alphas[step + 1] - alphas[step]) / (1 - alphas[step])
        return rate * probability > 1 - rate

    for prompt in ((5,), PROMPT, range(100, 120)):
        recorder = Recorder(model())
        options = params(
            max_tokens=16,
            diffusion_strategy="posterior",
            diffusion_noise_schedule="cosine",
            diffusion_max_steps=steps,
        )
        expected(recorder, prompt, options, eos_token_id=None)
        for (before, t, logits), (after, next_t, _) in pairwise(recorder.passes):
            step, next_step = (min(range(steps), key=lambda s: abs(1 - alphas[s] - time)) for time in (t, next_t))
            probabilities = logits.index_fill(1, torch.tensor(MASK), -1e12).softmax(-1).amax(-1).tolist()
            for column in [i for i in range(16) if before[i] == MASK]:
                assert due(next_step - 1, probabilities[column]) == (after[column] != MASK)
                assert not any(due(s, probabilities[column]) for s in range(step, next_step - 1))
                committed += after[column] != MASK
                waited += after[column] == MASK
            reused += next_step - 1 - step
    assert committed > 0
    assert waited > 0
    assert reused > 0


def test_posterior_draws_its_commits() -> None:
    """At temperature 1 without filters the energy is 0: every position is committed at the schedule's own rate."""
    text = scripted(rest={7: 0.4, 8: 0.3})
    steps, reused = 6, 0
    for seed in range(30):
        text.passes.clear()
        options = params(
            temperature=1.0,
            seed=seed,
            max_tokens=4,
            diffusion_strategy="posterior",
            diffusion_max_steps=steps,
            diffusion_canvas_length=4,
        )
        got = expected(text, [5, 6], options)
        tokens: dict[int, int] = {}
        pass_step, nfe = 0, 1  # of the pass whose predictions are in use
        for step in range(steps):
            if len(tokens) == 4:
                break
            rate = (1 - 1e-5) / (steps - step * (1 - 1e-5))
            numbers = {c: float(uniform(*map(torch.tensor, (seed, 2, step, c, 1)))) for c in range(4)}
            due = [c for c in range(4) if c not in tokens and (step == steps - 1 or numbers[c] < rate)]
            for column in due:
                u = float(uniform(*map(torch.tensor, (seed, 2, pass_step, column))))
                cumulative = text.inner.logits_at(9).index_fill(0, torch.tensor(MASK), -1e12)
                cumulative = cumulative.softmax(-1).double().cumsum(-1)
                tokens[column] = int((cumulative > u * cumulative[-1]).int().argmax())
            if due and len(tokens) < 4:
                pass_step, nfe = step + 1, nfe + 1
            reused += not due
        assert got.token_ids == [tokens[c] for c in range(4)]
        assert got.nfe == nfe == len(text.passes)
    assert reused > 10


def test_the_energy_weighs_a_filtered_or_cooled_prediction() -> None:
    """Probabilities 0.6, 0.3, 0.1: top-k 1 has the energy log 0.6, temperature 0.5 has half the log of 0.46."""
    logits = torch.full((VOCABULARY,), -math.inf)
    logits[10:13] = torch.tensor([0.6, 0.3, 0.1]).log()
    for options, energy, temperature in [
        ({"temperature": 1.0, "top_k": 1}, math.log(0.6), 1.0),
        ({"temperature": 0.5}, 0.5 * math.log(0.36 + 0.09 + 0.01), 0.5),
    ]:
        for seed in range(20):
            text = Recorder(Scripted(lambda position: logits))
            sampling = params(seed=seed, max_tokens=8, diffusion_strategy="posterior", diffusion_max_steps=2, **options)
            expected(text, [5], sampling, canvas_length=8)
            rate = (1 - 1e-5) / 2
            commits = 1 / (1 + math.exp(-(math.log(rate / (1 - rate)) + energy) / temperature))
            numbers = [float(uniform(*map(torch.tensor, (seed, 1, 0, column, 1)))) for column in range(8)]
            due = [number < commits for number in numbers]
            if any(due) and not all(due):
                assert [token != MASK for token in text.passes[1][0]] == due
            else:
                assert len(text.passes) == 1
