"""CUDA graphs, without CUDA: vLLM captures every kind of pass, and a real engine makes its passes by replay.

Before each replay the same pass is made eagerly on the same buffers, from the same memory: both must give the same
bits. The engine's tokens must be those of an engine without graphs.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from comparisons import assert_same_traces
from engines import generate, runner, running_engine, tokens_of
from golden_data import GOLDEN
from random_requests import draw_prompt
from replay import tensors_in
from serving import printed_by
from stand_in_graphs import StandInCuda, StandInGraph, stand_in_cuda
from torch import Tensor
from torch_layers import torch_attention, torch_layers
from vllm import LLM, SamplingParams
from vllm.v1.worker.gpu import cudagraph_utils

from vllm_twotower import kernels
from vllm_twotower.engine import pass_planner
from vllm_twotower.engine.metrics import EAGER
from vllm_twotower.engine.pass_graphs import PassDescriptor, PassGraphs, PassKind
from vllm_twotower.engine.tower_rows import DeviceRows
from vllm_twotower.model.moe_cpu import CpuMoE
from vllm_twotower.trace import TRACE

ROW_COUNTS = (1, 2, 4, 8)
WIDTH = 16


class Comparison:
    """Compares each replay of an engine with the same pass made eagerly."""

    def __init__(self, cuda: StandInCuda, graphs: PassGraphs):
        self._state, self._layers, self._replay = cuda.state, cuda.layers, graphs.replay
        table = cuda.state.table
        caches = [cache for layer in cuda.layers.values() for cache in tensors_in(layer.kv_cache)]
        self._memory = [*caches, table.canvas[:-1], table.step[:-1], cuda.runner.req_states.all_token_ids.gpu]
        self._graphs, self._passes = graphs, cuda.state.capturable_passes(cuda.runner.attn_groups)
        self.replays: Counter[tuple[PassKind, int]] = Counter()
        self.seen: Counter[str] = Counter()

    def replay(self, desc: PassDescriptor) -> None:
        rows = self._state.planner.buffered_rows(desc)
        before = self._copies()
        with torch_layers(self._layers, self._state.planner.state_block_size), self._experts_of(rows):
            decided = self._passes.run(desc)
            traced = () if decided is None else decided.traced()
        eager = self._copies()
        for memory, value in zip(self._memory, before, strict=True):
            memory.copy_(value)
        self._replay(desc)
        assert all(map(torch.equal, self._memory, eager)), desc
        if decided is not None:
            is_row = rows.lengths > 0
            assert torch.equal(self._graphs.outcome(desc)[is_row], decided.outcome[is_row]), desc
            for one, other in zip(self._graphs.traced(desc), traced, strict=True):
                assert torch.equal(one[is_row], other[is_row]), desc
        self._note(desc, rows)

    @contextmanager
    def _experts_of(self, rows: DeviceRows) -> Iterator[None]:
        """Checks that no expert is read for tokens that nobody asks for."""
        inert = rows.is_inert.flatten()

        def route(moe: CpuMoE, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
            experts, weights = choose(moe, hidden_states)
            self.seen["experts of inert tokens"] += int(inert.sum())
            assert (experts[inert] == experts[0]).all()
            return experts, weights

        choose = CpuMoE.route
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CpuMoE, "route", route)
            yield

    def _copies(self) -> list[Tensor]:
        return [memory.clone() for memory in self._memory]

    def _note(self, desc: PassDescriptor, rows: DeviceRows) -> None:
        page, lengths = self._state.planner.state_block_size, rows.lengths[rows.lengths > 0]
        starts = rows.starts[rows.lengths > 0]
        self.replays[desc.kind, desc.num_reqs] += 1
        self.seen["rows that fill up"] += len(lengths) < desc.num_reqs
        if desc.width > 1:
            self.seen[f"short rows of {desc.kind.name}"] += bool((lengths < desc.width).any())
        self.seen["page border"] += bool((starts // page != (starts + lengths - 1) // page).any())
        self.seen["first token of a page"] += bool((starts % page == 0).any())


def draw_requests(rng: random.Random) -> list[list[tuple[list[int], SamplingParams]]]:
    """Batches of requests, many of them greedy: blocks that are filled in step, token by token, and all sorts together.

    Prompts share beginnings, so that pages are found.
    """
    shared, temperatures = rng.choices(range(4, 300), k=80), random.Random(1)

    def draw_one(max_tokens: int, **options: Any) -> tuple[list[int], SamplingParams]:
        prompt = draw_prompt(rng) if rng.random() < 0.6 else shared[: rng.choice((40, 64, 70, 80))]
        draws = {"temperature": temperatures.choice((0, 0, 0.1, 1.0)), "seed": len(prompt)}
        return prompt, SamplingParams(**draws, max_tokens=max_tokens, ignore_eos=True, extra_args=options)

    batches = []
    for size, trace in zip((7, 4, 2, 1), ("none", "tokens", "passes", "none"), strict=True):
        batches.append([draw_one(40, diffusion_max_steps=1, diffusion_trace=trace) for _ in range(size)])
        batches.append([draw_one(6, diffusion_mode="ar", diffusion_trace=trace) for _ in range(size)])
        batches.append([draw_one(6, diffusion_mode="verified", diffusion_trace=trace) for _ in range(size)])
    mixed = [draw_one(rng.randint(1, 40), diffusion_mode="ar") for _ in range(4)]
    mixed += [draw_one(20, diffusion_mode="verified", diffusion_canvas_length=rng.choice((9, 16))) for _ in range(3)]
    for _ in range(8):
        threshold, length = rng.choice((0.02, 0.1, 0.8)), rng.choice((WIDTH, rng.randint(1, WIDTH)))
        options = {"diffusion_confidence_threshold": threshold, "diffusion_canvas_length": length}
        mixed.append(draw_one(rng.randint(1, 40), **options))
    return [*batches, mixed]


@pytest.mark.parametrize("checkpoint", ["A", pytest.param("C", marks=pytest.mark.slow)])
def test_passes_are_replayed(checkpoint: str) -> None:
    """Every kind of pass for every number of rows; and the engine's tokens are those of one without graphs."""
    batches = [tuple(zip(*requests, strict=True)) for requests in draw_requests(random.Random(7))]
    options = {"enable_prefix_caching": True, "max_model_len": 256, "block_size": 64, "kv_cache_memory_bytes": 8 << 20}
    model = GOLDEN / f"ckpt_{checkpoint}"
    with running_engine(model, **options) as llm:
        expected = [output for batch in batches for output in generate(llm, *batch)]
    with torch_attention(), running_engine(model, **options) as llm, stand_in_cuda(llm, ROW_COUNTS) as cuda:
        graphs = cuda.capture()
        assert cuda.entered == 1  # where ranks can be captured that communicate
        comparison = Comparison(cuda, graphs)
        graphs.replay = comparison.replay
        replayed = [output for batch in batches for output in generate(llm, *batch)]
    assert tokens_of(replayed) == tokens_of(expected)
    for one, other in zip(replayed, expected, strict=True):
        if hasattr(other.outputs[0], TRACE):
            assert_same_traces(one.outputs[0].diffusion_trace, other.outputs[0].diffusion_trace)
    assert set(comparison.replays) == {(kind, rows) for kind in PassKind for rows in ROW_COUNTS}
    assert min(comparison.replays.values()) > 1, comparison.replays
    assert all(comparison.seen.values()), comparison.seen


def test_graphs_are_profiled_and_forgotten() -> None:
    """vLLM captures two before it knows the size of the KV cache, on a small one, and reckons what all will take."""
    prompts = [list(range(4, 30)), list(range(50, 120))]
    params = [SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)] * 2
    with torch_attention(), running_engine(GOLDEN / "ckpt_A") as llm, stand_in_cuda(llm, (1, 2)) as cuda:
        expected = tokens_of(generate(llm, prompts, params))
        config = cuda.runner.kv_cache_config
        with torch_layers(cuda.layers, cuda.state.planner.state_block_size):
            estimate = cudagraph_utils.profile_cudagraph_memory(cuda.runner)
        assert estimate == len(PassKind) * 2 * StandInGraph.NUM_BYTES
        assert len(StandInGraph.alive) == 2
        assert cuda.runner.cudagraph_manager is None
        assert cuda.state._graphs() is None
        cuda.runner.initialize_kv_cache(config)
        graphs = cuda.capture()
        assert len(graphs.graphs) == len(PassKind) * 2
        assert tokens_of(generate(llm, prompts, params)) == expected


def test_why_rows_run_without_a_graph() -> None:
    """Rows are counted by reason, and their tokens are those of an engine without graphs."""

    def params(**options: Any) -> SamplingParams:
        return SamplingParams(**{"temperature": 0, "seed": 1, "max_tokens": 33, "ignore_eos": True, **options})

    requests = {
        "mixed": [params(max_tokens=1, extra_args={"diffusion_mode": "ar"})],  # nothing but its prompt
        "options": [params(temperature=1.0, top_k=9), params(extra_args={"diffusion_strategy": "posterior"})],
        "many": [params()] * 4,
    }
    prompt = list(range(4, 40))
    options = {"disable_log_stats": False}
    with torch_attention(), running_engine(GOLDEN / "ckpt_A", **options) as llm, stand_in_cuda(llm, (1, 2)) as cuda:
        expected = {reason: tokens_of(generate(llm, [prompt] * len(of), of)) for reason, of in requests.items()}
        assert not any(eager_rows(llm).values())
        cuda.capture()
        for reason, of_reason in requests.items():
            before = eager_rows(llm)
            assert tokens_of(generate(llm, [prompt] * len(of_reason), of_reason)) == expected[reason]
            grew = {name: count - before[name] for name, count in eager_rows(llm).items()}
            assert grew[reason] >= len(of_reason)
            assert {name for name, count in grew.items() if count} == {reason}


def test_what_layers_need_is_made_when_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """With CUDA graphs vLLM's builders keep what they made last at addresses that stay, so it holds for one run."""
    modes, events = ("mask_diffusion", "ar", "verified"), []

    def noted(event: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            events.append(event)
            return function(*args, **kwargs)

        return call

    with running_engine(GOLDEN / "ckpt_A") as llm:
        build = noted("made", pass_planner.build_attn_metadata)
        monkeypatch.setattr(pass_planner, "build_attn_metadata", build)
        for tower in ("context_tower", "denoiser_tower"):
            module = getattr(runner(llm).model_state.model, tower)
            monkeypatch.setattr(module, "forward", noted("run", module.forward))
        params = [
            SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, extra_args={"diffusion_mode": mode})
            for mode in modes
        ]
        generate(llm, [list(range(4, 30))] * 3, params)
    assert events.count("run") > 40
    assert ("made", "made") not in pairwise(events)


def test_kernels_are_replayed() -> None:
    """With the Triton kernels in Triton's interpreter, which needs a process of its own."""
    found = printed_by("kernel_replay.py")
    assert found["replayed"] == found["expected"]
    assert found["ran"].keys() == set(kernels.__all__)


def eager_rows(llm: LLM) -> dict[str, float]:
    values = {metric.name: metric for metric in llm.get_metrics()}
    return {reason: values[name].value for reason, name in EAGER.items()}
