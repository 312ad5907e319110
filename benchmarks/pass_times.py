"""What the passes of a TwoTower engine take, from whole steps of it that differ in their passes.

A pass cannot be timed from outside an engine, and from inside a clock would miss what a CUDA graph replays. But a step
that makes more passes than another takes longer by these passes. ``A`` is the context tower over one token of every
row, with its head and the decision; ``C`` the context tower over a finished block of 16; ``D`` the denoiser over the
canvases, with its head and the decision. All rows are in the same phase.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

PASSES = 8
"""Passes of the longer steps, and of a block."""
BLOCKS = 6

Measure = Callable[[Callable[[], Any]], tuple[Any, float]]
"""Runs a step; gives what that returns, and a figure of it."""
_names = itertools.count()


def seconds(step: Callable[[], Any]) -> tuple[Any, float]:
    """A :data:`Measure`: wall time. A step ends when its tokens have arrived."""
    started = time.perf_counter()
    result = step()
    return result, time.perf_counter() - started


def launches(step: Callable[[], Any]) -> tuple[Any, float]:
    """A :data:`Measure`: how often the host starts kernels or graphs."""
    result, events = profiled(step)
    starts = ("cudaLaunchKernel", "cudaLaunchCooperativeKernel", "cuLaunchKernel", "cudaGraphLaunch")
    return result, sum(event.count for event in events if event.key.startswith(starts))


def profiled(step: Callable[[], Any]) -> tuple[Any, list[Any]]:
    """What a step returns, and torch's averages of its events by name."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as profiler:
        result = step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return result, list(profiler.key_averages())


@dataclass
class Passes:
    """A figure (seconds, launches) of each pass, and of what else a step of one pass does."""

    A: float
    C: float
    D: float
    around_A: float
    around_D: float

    @classmethod
    def of(cls, ar: Steps, long_ar: Steps, diffusion: Steps, long_diffusion: Steps) -> Passes:
        """From steps of one pass and of ``PASSES``, in both modes."""
        a = (long_ar.usual - ar.usual) / (PASSES - 1)
        d = (long_diffusion.first_of_block - diffusion.first_of_block) / (PASSES - 1)
        c = diffusion.first_of_block - diffusion.further
        return cls(a, c, d, ar.usual - a, diffusion.further - d)


@dataclass
class Steps:
    """Figures of the steps after those with the prompts, and whether each returned tokens."""

    figures: list[float]
    returned: list[bool]

    @property
    def usual(self) -> float:
        """The median of all."""
        return statistics.median(self.figures)

    @property
    def first_of_block(self) -> float:
        """The median of steps after one that returned tokens: these read a finished block first."""
        return statistics.median(self._after(True))

    @property
    def further(self) -> float:
        """The median of the other steps."""
        return statistics.median(self._after(False))

    def _after(self, returned: bool) -> list[float]:
        return [figure for figure, before in zip(self.figures[1:], self.returned, strict=False) if before == returned]


def passes(llm: Any, num_rows: int, context: int, measure: Measure, blocks: int = BLOCKS) -> Passes:
    """Measures the passes over rows of so many tokens each."""
    runs = [
        run(llm, num_rows, context, mode, per_step, measure, blocks)
        for mode in ("ar", "mask_diffusion")
        for per_step in (1, PASSES)
    ]
    return Passes.of(*runs)


def run(llm: Any, num_rows: int, context: int, mode: str, per_step: int, measure: Measure, blocks: int) -> Steps:
    """Steps of an engine on random prompts, with so many passes in each."""
    from vllm import SamplingParams

    state = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model_state
    state.table.engine = replace(state.table.engine, denoise_steps_per_engine_step=per_step)
    options: dict[str, Any] = {"diffusion_mode": mode}
    tokens = blocks * (per_step if mode == "ar" else state.options.canvas_length)
    if mode != "ar":
        # No prediction is certain, so a pass commits one position, and the last one all that is left.
        options |= {"diffusion_confidence_threshold": 1.0, "diffusion_max_steps": PASSES}
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, extra_args=options)
    return drive(llm, prompts_of(num_rows, context, state.model_config.get_vocab_size()), params, measure)


def prompts_of(num_rows: int, context: int, vocab_size: int) -> list[list[int]]:
    """Random token ids."""
    rng = random.Random(0)
    return [rng.choices(range(4, vocab_size), k=context) for _ in range(num_rows)]


def drive(llm: Any, prompts: Sequence[list[int]], params: Any, measure: Measure) -> Steps:
    """Answers prompts, which are read in one step."""
    engine, counts = llm.llm_engine, defaultdict(int)
    for prompt in prompts:
        engine.add_request(f"pass-{next(_names)}", {"prompt_token_ids": prompt}, params)
    steps = Steps([], [])
    engine.step()
    while engine.has_unfinished_requests():
        outputs, figure = measure(engine.step)
        before = sum(counts.values())
        counts |= {output.request_id: len(output.outputs[0].token_ids) for output in outputs}
        steps.figures.append(figure)
        steps.returned.append(sum(counts.values()) > before)
    return steps


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Weights under which tokens differ and choose experts of their own; vLLM's dummy ones are all nearly zero."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    for name, weight in model.named_parameters():
        if not weight.is_floating_point():
            continue
        if name.endswith(".A"):
            weight.fill_(-1)
        elif "norm" in name or name.endswith(".D"):
            weight.fill_(1)
        elif weight.dim() < 2:
            weight.zero_()
        else:
            weight.normal_(0, 1 if "embed_tokens" in name else weight.shape[-1] ** -0.5, generator=generator)


@contextmanager
def routed(model: nn.Module, experts_per_token: int) -> Iterator[dict[tuple[str, int], list[int]]]:
    """Notes how many different experts each MoE layer of an eager engine reads, by tower and number of tokens."""
    seen: dict[tuple[str, int], list[int]] = defaultdict(list)

    def note(tower: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(moe: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            scores = torch.sigmoid(inputs[0].float() @ moe.gate.weight.float().T) + moe.gate.e_score_correction_bias
            seen[tower, len(inputs[0])].append(len(scores.topk(experts_per_token).indices.unique()))

        return hook

    handles = [
        module.register_forward_pre_hook(note(name.partition(".")[0]))
        for name, module in model.named_modules()
        if hasattr(getattr(module, "gate", None), "e_score_correction_bias")
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
