"""Traces are what the engine decided: NVIDIA's canvases on the golden data, the same in any batch."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from comparisons import assert_same_traces
from engines import core, generate, running_engine, tokens_of, traced
from golden_data import CHECKPOINTS, DiffusionRun, checkpoint, diffusion_runs
from vllm import LLM, RequestOutput, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind

from vllm_twotower.trace import DiffusionTrace

MASK = 3
PROMPT = list(range(5, 45))
NEAR = 2e-5


def traced_params(run: DiffusionRun, level: str = "passes", **options: Any) -> SamplingParams:
    params = run.params()
    return run.params(extra_args={**params.extra_args, "diffusion_trace": level}, **options)


def params(trace: str | None = "passes", max_tokens: int = 40, **options: Any) -> SamplingParams:
    fields = {name: options.pop(name) for name in list(options) if not name.startswith("diffusion_")}
    if trace is not None:
        options["diffusion_trace"] = trace
    return SamplingParams(
        **{"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, **fields}, extra_args=options
    )


def trace_of(output: RequestOutput, index: int = 0) -> DiffusionTrace:
    return output.outputs[index].diffusion_trace


def canvases(trace: DiffusionTrace) -> list[list[tuple[float, tuple[int, ...]]]]:
    """For every block of every pass the time and the canvas after it."""
    return [[(t, tuple(canvas)) for t, canvas in zip(b.t, b.canvases, strict=True)] for b in trace.blocks]


def check(trace: DiffusionTrace, num_tokens: int) -> None:
    """What holds of every trace: its lists are as long as the completion, its blocks lie one behind the other."""
    assert {len(values) for name, values in vars(trace).items() if name != "blocks"} == {num_tokens}
    assert DiffusionTrace.from_json(json.loads(json.dumps(trace.to_json()))).to_json() == trace.to_json()
    for number, block in enumerate(trace.blocks):
        assert trace.block[block.start : block.start + block.tokens] == [number] * block.tokens
    assert all(b is not None or d is None for b, d in zip(trace.block, trace.decided_in, strict=True))
    assert all(0 <= r <= 1 for r in trace.runner_up)
    assert all(0 < c <= 1 for c in trace.confidence)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_canvases_are_the_reference_s(name: str) -> None:
    """All golden runs in one batch, half of them with all their passes."""
    runs = [run for run in diffusion_runs(name) if run.blocks]
    levels = ["passes" if i % 2 else "tokens" for i in range(len(runs))]
    asked = [traced_params(run, level) for run, level in zip(runs, levels, strict=True)]
    with running_engine(checkpoint(name)) as llm, traced(llm) as record:
        outputs = generate(llm, [run.prompt for run in runs], asked)
    for run, level, output in zip(runs, levels, outputs, strict=True):
        trace, steps = trace_of(output), iter(record.of(output))
        check(trace, len(run.tokens))
        assert [block.passes for block in trace.blocks] == [len(block) for block in run.blocks]
        if level == "passes":
            expected = [[(pytest.approx(t), after) for t, _, after in block] for block in run.blocks]
            assert canvases(trace) == expected
        for block, of_block in zip(trace.blocks, run.blocks, strict=True):
            for number, (_, before, after) in enumerate(of_block, 1):
                logits = next(steps).logits.clone()
                logits[:, run.mask_token_id] = -torch.inf
                first, second = logits.softmax(-1).topk(2).values.T.tolist()
                for place in range(block.tokens):
                    if before[place] == run.mask_token_id != after[place]:
                        at = block.start + place
                        assert trace.decided_in[at] == number
                        assert trace.confidence[at] == pytest.approx(first[place], abs=NEAR)
                        assert trace.runner_up[at] == pytest.approx(second[place], abs=NEAR)


def test_preemption() -> None:
    """A block that is started again has one trace: that of the passes that filled it."""
    page = 64 << 10  # 128 tokens of keys and values, or one state, of this checkpoint
    asked = [
        params(max_tokens=60, diffusion_mode=mode)
        for mode in ("mask_diffusion", "verified", "ar", "mask_diffusion") * 2
    ]
    asked[3::4] = [params(max_tokens=60, diffusion_confidence_threshold=0.3)] * 2
    prompts = [random.Random(i).choices(range(4, 300), k=95 + 3 * i) for i in range(len(asked))]
    with running_engine(checkpoint("A"), max_model_len=256) as llm:
        alone = [generate(llm, [prompt], [one])[0] for prompt, one in zip(prompts, asked, strict=True)]
    few_pages = {"max_model_len": 256, "kv_cache_memory_bytes": 14 * page}
    with running_engine(checkpoint("A"), **few_pages) as llm, pytest.MonkeyPatch.context() as patch:
        scheduler, preempted = core(llm).scheduler, []
        preempt = scheduler._preempt_request

        def count(request: Any, *args: Any, **kwargs: Any) -> None:
            preempted.append(request)
            preempt(request, *args, **kwargs)

        patch.setattr(scheduler, "_preempt_request", count)
        outputs = generate(llm, prompts, asked)
        assert preempted
    assert tokens_of(outputs) == tokens_of(alone)
    for one, other, of_request in zip(alone, outputs, asked, strict=True):
        if of_request.extra_args.get("diffusion_mode") == "verified":  # starts again with a token of the context tower
            assert trace_of(other).confidence == pytest.approx(trace_of(one).confidence, abs=NEAR)
        else:
            assert_same_traces(trace_of(one), trace_of(other))


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with running_engine(checkpoint("A")) as llm:
        yield llm


def mixed_requests(trace: str | None) -> list[SamplingParams]:
    """One of each kind; of drafts, of blocks that a stop or the limit cuts, and of drawn tokens."""
    return [
        params(trace),
        params(trace, diffusion_mode="ar"),
        params(trace, diffusion_mode="verified"),
        params(trace, diffusion_mode="verified", diffusion_draft_steps=3, diffusion_canvas_length=9),
        params(trace, max_tokens=21, diffusion_strategy="predict_and_noise", diffusion_max_steps=4),
        params(trace, diffusion_strategy="posterior", temperature=0.7, seed=3, diffusion_canvas_length=5),
        params(trace, temperature=1.0, seed=5, top_k=3, diffusion_confidence_threshold=0.3),
        params(trace, diffusion_mode="ar", temperature=1.0, seed=6, max_tokens=9),
    ]


def test_traces_in_any_batch(llm: LLM) -> None:
    """Alone, together, and beside requests without a trace, whose tokens are the same."""
    asked, plain = mixed_requests("passes"), mixed_requests(None)
    alone = [generate(llm, [PROMPT], [one])[0] for one in asked]
    together = generate(llm, [PROMPT] * 16, [one for pair in zip(asked, plain, strict=True) for one in pair])
    untraced = generate(llm, [PROMPT] * 8, plain)
    assert tokens_of(together[::2]) == tokens_of(together[1::2]) == tokens_of(alone) == tokens_of(untraced)
    for one, other, without in zip(alone, together[::2], untraced, strict=True):
        assert_same_traces(trace_of(one), trace_of(other))
        check(trace_of(one), len(one.outputs[0].token_ids))
        assert not hasattr(without.outputs[0], "diffusion_trace")


def test_modes(llm: LLM) -> None:
    """Token by token there are no blocks. A draft's tokens stay up to the first that the context tower replaces."""
    ar, verified = generate(llm, [PROMPT] * 2, [params(diffusion_mode=mode) for mode in ("ar", "verified")])
    assert trace_of(ar).blocks == []
    assert set(trace_of(ar).block) == {None}
    assert trace_of(verified).confidence == pytest.approx(trace_of(ar).confidence, abs=NEAR)
    assert trace_of(verified).runner_up == pytest.approx(trace_of(ar).runner_up, abs=NEAR)
    tokens, trace = list(verified.outputs[0].token_ids), trace_of(verified)
    assert trace.block[0] is None  # the prompt's last pass gives it
    for block in trace.blocks:
        draft, returned = block.canvases[-1], tokens[block.start : block.start + block.tokens]
        assert draft[0] == tokens[block.start - 1]
        assert block.drafted == len(draft) - 1
        assert block.tokens in (block.accepted + 1, len(tokens) - block.start)
        assert draft[1 : 1 + block.accepted] == returned[: block.accepted]
        decided_in = trace.decided_in[block.start : block.start + block.tokens]
        assert decided_in == [1] * block.accepted + [None] * (block.tokens - block.accepted)


def test_parts_of_a_stream(llm: LLM) -> None:
    """Outputs with new tokens only have the trace of these; vLLM may put several together."""
    whole = generate(llm, [PROMPT], [params(max_tokens=50)])[0]
    streamed, parts = params(max_tokens=50), []
    streamed.output_kind = RequestOutputKind.DELTA
    llm.llm_engine.add_request("streamed", {"prompt_token_ids": PROMPT}, streamed)
    while llm.llm_engine.has_unfinished_requests():
        parts += llm.llm_engine.step()
    assert len(parts) > 2
    collected = DiffusionTrace()
    for part in parts:
        assert len(trace_of(part)) == len(part.outputs[0].token_ids)
        collected.extend(trace_of(part))
    assert_same_traces(collected, trace_of(whole))
    first, second = parts[:2]
    first.add(second, aggregate=True)
    merged = trace_of(whole).part(0, len(first.outputs[0].token_ids))
    assert_same_traces(trace_of(first), merged)


def test_several_completions(llm: LLM) -> None:
    """Each has its own trace, and ends with its tokens."""
    [output] = generate(llm, [PROMPT], [params(n=3, temperature=1.0, seed=1, max_tokens=20)])
    for index, completion in enumerate(output.outputs):
        check(trace_of(output, index), len(completion.token_ids))
        for block in trace_of(output, index).blocks:
            returned = list(completion.token_ids[block.start : block.start + block.tokens])
            assert block.canvases[-1][: block.tokens] == returned
    assert len({tuple(trace_of(output, i).decided_in) for i in range(3)}) > 1


def test_stops_cut_traces(llm: LLM) -> None:
    """A token that ends a request in a block, and one that the front end finds."""
    whole = generate(llm, [PROMPT], [params()])[0]
    for place in (3, 19):
        stop = whole.outputs[0].token_ids[place]
        first = whole.outputs[0].token_ids.index(stop)
        [cut] = generate(llm, [PROMPT], [params(stop_token_ids=[stop])])
        assert len(cut.outputs[0].token_ids) == first + 1
        assert_same_traces(trace_of(cut), trace_of(whole).part(0, first + 1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"diffusion_trace": "all"}, "diffusion_trace='all': must be one of 'none', 'tokens', 'passes'"),
        ({"diffusion_trace": 1}, "diffusion_trace=1: must be one of"),
        ({"diffusion_trace": "passes", "diffusion_max_steps": 1025}, "diffusion_max_steps=1025"),
        ({"diffusion_trace": "all", "diffusion_mode": "ar"}, "diffusion_trace='all'"),
    ],
)
def test_refused(llm: LLM, options: dict[str, Any], words: str) -> None:
    with pytest.raises(VLLMValidationError, match="diffusion_") as caught:
        generate(llm, [PROMPT], [SamplingParams(extra_args=options)])
    assert words in str(caught.value)
