"""The table of request options in docs/requests.md: every row is checked in every mode, and the table is made of them.

PYTHONPATH=tests python tests/engine/test_request_table.py    # writes the table into docs/requests.md
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")
import golden_data
import numpy as np
import torch
from comparisons import assert_logprobs, assert_prompt_logprobs, model
from engines import assert_idle, generate, running_engine
from oracle import expected
from vllm import LLM, RequestOutput, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RepetitionDetectionParams, RequestOutputKind, StructuredOutputsParams

from vllm_twotower.options import RequestOptions

DOCUMENT = Path(__file__).parents[2] / "docs" / "requests.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"
PROMPT = [5, 60, 7, 200, 31]
BLOCKS, VERIFIED, AUTOREGRESSIVE = ("mask_diffusion",), ("verified",), ("ar",)
MODES = BLOCKS + VERIFIED + AUTOREGRESSIVE
"""Not ``auto``, whose requests go through these modes."""


@dataclass
class Asker:
    """Asks an engine and the oracle for the same request in one mode."""

    llm: LLM
    mode: str

    def options(self, **options: Any) -> dict[str, Any]:
        extra = {"diffusion_mode": self.mode, **options.pop("extra_args", {})}
        return {"temperature": 0, "max_tokens": 40, **options, "extra_args": extra}

    def ask(self, **options: Any) -> RequestOutput:
        [output] = generate(self.llm, [PROMPT], [SamplingParams(**self.options(**options))])
        return output

    def tokens(self, **options: Any) -> list[int]:
        return list(self.ask(**options).outputs[0].token_ids)

    def check(self, **options: Any) -> list[int]:
        """The request's tokens, which are the oracle's, and so are the reason of its end and its log-probabilities.

        The oracle knows ``verified`` as ``ar``.
        """
        output = self.ask(**options)
        [completion] = output.outputs
        asked = self.options(**options)
        if self.mode in VERIFIED:
            asked["extra_args"] = {"diffusion_mode": "ar"}
        params = SamplingParams(**asked)
        params.update_from_tokenizer(self.llm.get_tokenizer())
        want = expected(model(), PROMPT, params)
        assert list(completion.token_ids) == want.token_ids
        assert completion.finish_reason == want.finish_reason
        if params.num_logprobs is not None:
            assert_logprobs(completion.logprobs, want)
        if params.prompt_logprobs is not None:
            assert_prompt_logprobs(output, PROMPT)
        return want.token_ids

    def check_effect(self, base: dict[str, Any], **options: Any) -> None:
        """As :meth:`check`, and ``options`` give other tokens than ``base`` alone, unless they are those of drafts."""
        changes = self.mode not in VERIFIED or options.keys() != {"extra_args"}
        assert (self.check(**base) != self.check(**{**base, **options})) == changes


@dataclass(frozen=True)
class Option:
    """A row: how an option that is honoured is checked, and a value that is refused in the other modes."""

    name: str
    meaning: str
    check: Callable[[Asker], Any] | None = None
    honoured: tuple[str, ...] = MODES
    refused_value: Any = None

    def cells(self) -> list[str]:
        name = "`vllm_xargs`: " if self.name.startswith("diffusion_") else ""
        columns = ["yes" if mode in self.honoured else "refused" for mode in MODES]
        return [f"{name}`{self.name}`", *columns, self.meaning]


RANDOM = {"temperature": 1.0, "seed": 1, "ignore_eos": True}
FREE = {"ignore_eos": True}


def effect(base: dict[str, Any], **options: Any) -> Callable[[Asker], None]:
    return lambda asker: asker.check_effect(base, **options)


def check_n(asker: Asker) -> None:
    outputs = asker.ask(**RANDOM, n=3).outputs
    assert [list(o.token_ids) for o in outputs] == [asker.check(**{**RANDOM, "seed": 1 + i}) for i in range(3)]


def check_stop_string(asker: Asker) -> None:
    whole = asker.ask(**FREE).outputs[0].text
    stop = whole[4:6]
    [completion] = asker.ask(**FREE, stop=["nowhere to be found", stop]).outputs
    assert (completion.text, completion.stop_reason) == (whole[: whole.index(stop)], stop)


def check_included_stop_string(asker: Asker) -> None:
    whole = asker.ask(**FREE).outputs[0].text
    stop = whole[4:6]
    [completion] = asker.ask(**FREE, stop=[stop], include_stop_str_in_output=True).outputs
    assert completion.text == whole[: whole.index(stop) + 2]


def check_stop_token(asker: Asker) -> None:
    stop = asker.tokens(**FREE)[7]
    asker.check_effect(FREE, stop_token_ids=[stop])
    assert asker.ask(**FREE, stop_token_ids=[stop]).outputs[0].stop_reason == stop


def check_min_tokens(asker: Asker) -> None:
    stop = asker.tokens(**FREE)[3]
    asker.check_effect({"stop_token_ids": [stop]}, min_tokens=20)
    assert len(asker.tokens(stop_token_ids=[stop], min_tokens=20)) >= 20


def check_allowed(asker: Asker) -> None:
    asker.check_effect(FREE, allowed_token_ids=[8, 9, 10, 11])
    assert set(asker.tokens(**FREE, allowed_token_ids=[8, 9, 10, 11])) <= {8, 9, 10, 11}


def check_logit_bias(asker: Asker) -> None:
    first = asker.tokens(**FREE)[0]
    asker.check_effect(FREE, logit_bias={first: -100})
    assert first not in asker.tokens(**FREE, logit_bias={first: -100})


def check_bad_words(asker: Asker) -> None:
    tokenizer, tokens = asker.llm.get_tokenizer(), asker.tokens(**FREE)
    words = [w for w in map(tokenizer.decode, zip(tokens, tokens[1:], strict=False)) if w.isascii() and w.strip() == w]
    words += [w for w in map(tokenizer.decode, tokens) if w.isascii() and w.strip() == w and w]
    asker.check_effect(FREE, bad_words=words)


def check_prompt_token_ids(asker: Asker) -> None:
    ids = np.arange(12).reshape(4, 3)
    scores = asker.ask(prompt_logprob_token_ids=ids).prompt_token_id_logprobs
    logits = model().context_logits(torch.tensor([PROMPT]))[0].log_softmax(-1)
    want = logits[:-1].gather(1, torch.from_numpy(ids)).detach().numpy()
    np.testing.assert_allclose(scores, want, atol=1e-4)


def check_repetition(asker: Asker) -> None:
    detection = RepetitionDetectionParams(max_pattern_size=1, min_count=4)
    [completion] = asker.ask(**FREE, logit_bias={10: 100}, repetition_detection=detection).outputs
    assert (list(completion.token_ids), completion.finish_reason) == ([10] * 4, "repetition")


def check_grammar(asker: Asker) -> None:
    [completion] = asker.ask(structured_outputs=StructuredOutputsParams(regex="[a-c]{5}[0-9]{2}")).outputs
    assert re.fullmatch("[a-c]{5}[0-9]{2}", completion.text)
    assert completion.finish_reason == "stop"


def check_stream(asker: Asker) -> None:
    engine, pieces = asker.llm.llm_engine, []
    params = SamplingParams(**asker.options(**FREE), output_kind=RequestOutputKind.DELTA)
    engine.add_request("streamed", {"prompt_token_ids": PROMPT}, params)
    while engine.has_unfinished_requests():
        pieces += [list(output.outputs[0].token_ids) for output in engine.step()]
    assert [token for piece in pieces for token in piece] == asker.tokens(**FREE)
    assert asker.mode in VERIFIED or [len(piece) for piece in pieces] == [16, 16, 8]


def check_trace(asker: Asker) -> None:
    tokens = asker.tokens(**FREE)
    [completion] = asker.ask(**FREE, extra_args={"diffusion_trace": "passes"}).outputs
    assert list(completion.token_ids) == tokens
    assert len(completion.diffusion_trace) == len(tokens)


def block_option(
    name: str,
    meaning: str,
    value: Any,
    base: dict[str, Any] | None = None,
    honoured: tuple[str, ...] = BLOCKS + VERIFIED,
) -> Option:
    """An option of the block sampler, set on top of the options ``base``."""
    greedy = {"ignore_eos": True, "seed": 1}

    def check(asker: Asker) -> None:
        of_base = dict(base or {})
        if asker.mode in VERIFIED and (steps := of_base.pop("diffusion_max_steps", None)):
            of_base["diffusion_draft_steps"] = steps
        asker.check_effect({**greedy, "extra_args": of_base}, extra_args={**of_base, name: value})

    return Option(name, meaning, check, honoured, value)


OPTIONS = (
    Option("max_tokens", "the last block is cut", effect(FREE, max_tokens=21)),
    Option(
        "temperature",
        "a pass draws its predictions from the tempered distribution; the confidence stays the untempered probability",
        effect({**FREE, "seed": 1}, temperature=1.0),
    ),
    Option("top_k", "filters what a prediction is drawn from", effect(RANDOM, top_k=2)),
    Option("top_p", "filters what a prediction is drawn from, after `min_p` and `top_k`", effect(RANDOM, top_p=0.3)),
    Option("min_p", "filters what a prediction is drawn from", effect(RANDOM, min_p=0.5)),
    Option(
        "seed",
        "random numbers are a function of seed, block, pass and position; without a seed, of `--seed` and the "
        "request's id instead",
        effect(RANDOM, seed=2),
    ),
    Option("n", "completion i has the seed plus i", check_n),
    Option("stop", "cuts the text wherever it ends in a block, and across blocks", check_stop_string),
    Option("include_stop_str_in_output", "as in any model", check_included_stop_string),
    Option("stop_token_ids", "the first of them in the order of positions ends the text", check_stop_token),
    Option("ignore_eos", "as in any model", effect({"logit_bias": {2: 20}}, ignore_eos=True)),
    Option("min_tokens", "no end token is predicted at a position before it", check_min_tokens),
    Option("logit_bias", "added at every position of every pass, before confidences are taken", check_logit_bias),
    Option("allowed_token_ids", "nothing else is predicted at any position", check_allowed),
    Option(
        "bad_words",
        "a token that would complete one is not predicted where all others stand; of tokens that would make one up "
        "in the same pass only the most confident stays (so a block can take more passes than `diffusion_max_steps`)",
        check_bad_words,
    ),
    Option(
        "presence_penalty",
        "of tokens returned before the block or decided in it by earlier passes, at any position",
        effect(FREE, presence_penalty=2.0),
    ),
    Option("frequency_penalty", "counts the same tokens", effect(FREE, frequency_penalty=2.0)),
    Option("repetition_penalty", "the same tokens, and the prompt's", effect(FREE, repetition_penalty=1.9)),
    Option(
        "logprobs",
        "of the pass in which a token was decided, the mask token excluded; `--logprobs-mode` as in any model",
        lambda asker: asker.check(**FREE, logprobs=3),
    ),
    Option("logprob_token_ids", "of the same pass", lambda asker: asker.check(**FREE, logprob_token_ids=[5, 6, 7])),
    Option(
        "prompt_logprobs",
        "the context tower's: the exact autoregressive likelihood of the prompt",
        lambda asker: asker.check(prompt_logprobs=2),
    ),
    Option("prompt_logprob_token_ids", "the context tower's", check_prompt_token_ids),
    Option("repetition_detection", "as in any model: cuts inside a block", check_repetition),
    Option("output_kind", "streaming sends whole blocks, or what was accepted of one", check_stream),
    Option(
        "structured_outputs",
        "a grammar needs tokens one after another; JSON schema, regex, choice and grammar work in the other modes, "
        "without drafts",
        check_grammar,
        VERIFIED + AUTOREGRESSIVE,
        StructuredOutputsParams(regex="a+"),
    ),
    Option("thinking_token_budget", "not supported", None, (), 3),
    Option("trace_decode_token_ids", "not supported", None, (), [5]),
    block_option("diffusion_canvas_length", "tokens denoised at once, 1 to the served length", 5),
    block_option(
        "diffusion_max_steps", "passes a block may take, 1 to 1024; the last one decides what is left", 2, None, BLOCKS
    ),
    block_option("diffusion_draft_steps", "passes that draft a block, 1 to 1024", 2, None, VERIFIED),
    block_option(
        "diffusion_lossless",
        "of `auto` alone: it chooses between `verified` and `ar`, so its text does not depend on the choice",
        True,
        None,
        (),
    ),
    block_option("diffusion_confidence_threshold", "of `confidence_unmasking`: (0, 1]", 0.05),
    block_option(
        "diffusion_strategy", "which predictions a pass keeps, see below", "posterior", {"diffusion_max_steps": 3}
    ),
    block_option(
        "diffusion_noise_schedule",
        "of `posterior` and `predict_and_noise`: `linear`, `cosine`, `exponential`",
        "cosine",
        {"diffusion_strategy": "predict_and_noise", "diffusion_max_steps": 5},
    ),
    block_option(
        "diffusion_adaptive_unmasking",
        "of `predict_and_noise`: slow at first",
        True,
        {"diffusion_strategy": "predict_and_noise", "diffusion_max_steps": 6},
    ),
    block_option(
        "diffusion_remasking",
        "of `predict_and_noise`: predictions are ranked by `confidence`, `margin`, or at `random`",
        "random",
        {"diffusion_strategy": "predict_and_noise", "diffusion_max_steps": 5},
    ),
    Option(
        "diffusion_trace",
        "`none`, `tokens` or `passes`: what was decided of each token, when and how surely, see [traces.md](traces.md)",
        check_trace,
    ),
)

# What vLLM's front end does with every model's output.
FRONT_END: dict[str, Any] = {
    "detokenize": False,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "flat_logprobs": True,
    "stream_interval": 2,
    "skip_reading_prefix_cache": True,
    "skip_clone": True,
}
# Belong to options above, or to features that a TwoTower engine does not start with.
ELSEWHERE = {
    "extra_args",
    "prompt_logprob_start",
    "output_text_buffer_length",
    "watermarking",
    "routed_experts_prompt_start",
}


def table() -> str:
    rows = [["option", *(f"`{mode}`" for mode in MODES), "meaning in a block"], ["---"] * 5]
    rows += [option.cells() for option in OPTIONS]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with running_engine(golden_data.checkpoint("A")) as llm:
        yield llm
        assert_idle(llm)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_row(llm: LLM, option: Option, mode: str) -> None:
    asker = Asker(llm, mode)
    if mode in option.honoured:
        option.check(asker)
        return
    extra = option.name.startswith("diffusion_")
    options = {"extra_args": {option.name: option.refused_value}} if extra else {option.name: option.refused_value}
    with pytest.raises(VLLMValidationError, match=option.name):
        asker.ask(**options)
    asker.check()


@pytest.mark.parametrize("mode", MODES)
def test_front_end_options_do_not_change_the_tokens(llm: LLM, mode: str) -> None:
    asker = Asker(llm, mode)
    for name, value in FRONT_END.items():
        assert asker.tokens(**FREE, **{name: value}) == asker.tokens(**FREE)


def test_every_option_has_a_row() -> None:
    """A new field of vLLM's SamplingParams fails here until somebody says what it means in a block."""
    known = {option.name for option in OPTIONS}
    fields = {name for name in SamplingParams.__struct_fields__ if not name.startswith("_")}
    assert fields - known - FRONT_END.keys() - ELSEWHERE == set()
    ours = {"diffusion_" + name for name in RequestOptions.__dataclass_fields__}
    assert {name for name in known if name.startswith("diffusion_")} == ours - {"diffusion_mode"}


def test_document_has_this_table() -> None:
    """Otherwise: PYTHONPATH=tests python tests/engine/test_request_table.py"""
    assert DOCUMENT.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0] == table()


def write_table() -> None:
    before, rest = DOCUMENT.read_text(encoding="utf-8").split(BEGIN)
    DOCUMENT.write_text(before + BEGIN + table() + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    write_table()
