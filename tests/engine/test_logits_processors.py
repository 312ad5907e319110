"""Custom logits processors of vLLM: called in every mode, with rows that say where they are."""

from __future__ import annotations

from collections.abc import Iterator

import engines
import golden_data
import numpy as np
import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor

ALLOWED = sorted(range(5, 320, 3))
MASK_TOKEN_ID = golden_data.record("A")["mask_token_id"]
PROMPTS = [list(range(7, 7 + length)) for length in (3, 17, 40)]
SAMPLING = ({"temperature": 0}, {"temperature": 1.0, "seed": 4}, {"temperature": 0.7, "seed": 9, "top_p": 0.9})
MODES = ("mask_diffusion", "ar", "verified", "auto")


class OnlyMultiples(LogitsProcessor):
    """Leaves a request with an argument ``offset`` the tokens at every third place from there on."""

    seen: list[tuple[LogitsContext, torch.Tensor]] = []

    def __init__(self, vllm_config, req_states):
        self._text = req_states.all_token_ids
        self._offsets = np.zeros(req_states.max_num_reqs, dtype=np.int64)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        if (sampling_params.extra_args or {}).get("offset", 1) < 1:
            raise ValueError("offset must be at least 1")

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        self._offsets[req_idx] = (sampling_params.extra_args or {}).get("offset", 0)
        return bool(self._offsets[req_idx])

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        text = self._text.gpu[ctx.expanded_idx_mapping.long(), (ctx.pos - ctx.expanded_local_pos).long()]
        self.seen.append((ctx, text))
        logits = logits.clone()  # one of the two ways to change them
        for row, slot in enumerate(ctx.expanded_idx_mapping.tolist()):
            if offset := self._offsets[slot]:
                allowed = torch.zeros(logits.shape[1], dtype=torch.bool)
                allowed[offset::3] = True
                logits[row, ~allowed] = -torch.inf
        return logits


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with engines.running_engine(golden_data.checkpoint("A"), logits_processors=[OnlyMultiples]) as running:
        yield running


def answers(llm: LLM, mode: str, extra: dict, **rules: object) -> list[tuple[int, ...]]:
    params = [
        SamplingParams(
            max_tokens=20, ignore_eos=True, extra_args={"diffusion_mode": mode, **extra}, **rules, **sampling
        )
        for sampling in SAMPLING
    ]
    pairs = [(prompt, one) for prompt in PROMPTS for one in params]
    return engines.tokens_of(engines.generate(llm, [prompt for prompt, _ in pairs], [one for _, one in pairs]))


@pytest.mark.parametrize("mode", MODES[:3])
def test_as_if_only_some_tokens_were_allowed(llm: LLM, mode: str) -> None:
    changed = answers(llm, mode, {"offset": ALLOWED[0]})
    assert changed == answers(llm, mode, {}, allowed_token_ids=ALLOWED)
    assert changed != answers(llm, mode, {})


def test_verified_as_ar(llm: LLM) -> None:
    assert answers(llm, "verified", {"offset": ALLOWED[0]}) == answers(llm, "ar", {"offset": ALLOWED[0]})


def test_auto(llm: LLM) -> None:
    assert set().union(*answers(llm, "auto", {"offset": ALLOWED[0]})) <= set(ALLOWED)


@pytest.mark.parametrize("mode", MODES[:3])
def test_rows_say_where_they_are(llm: LLM, mode: str) -> None:
    """The token before each row: the sequence's newest, or within a block the one beside it, perhaps still masked."""
    OnlyMultiples.seen.clear()
    answers(llm, mode, {"offset": ALLOWED[0]})
    assert OnlyMultiples.seen
    seen_of_blocks = set()
    for ctx, newest in OnlyMultiples.seen:
        is_first = ctx.expanded_local_pos == 0
        assert torch.equal(ctx.input_ids[is_first], newest[is_first].int())
        seen_of_blocks.add(not is_first.all())
        beside = set(ctx.input_ids[~is_first].tolist())
        assert beside <= {*ALLOWED, MASK_TOKEN_ID}
        assert ctx.idx_mapping.tolist() == ctx.idx_mapping_np.tolist()
    # A draft is a block, and what verifies it is not.
    assert seen_of_blocks == {"mask_diffusion": {True}, "ar": {False}, "verified": {True, False}}[mode]


def test_arguments_are_checked(llm: LLM) -> None:
    """By the processor at admission; the model's own options as ever."""
    with pytest.raises(VLLMValidationError, match="offset must be at least 1"):
        answers(llm, "ar", {"offset": 0})
    with pytest.raises(VLLMValidationError, match="diffusion_offset=1"):
        answers(llm, "ar", {"diffusion_offset": 1})
