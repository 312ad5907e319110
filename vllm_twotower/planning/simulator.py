"""A simulation of continuous batching at a steady load, engine step by engine step.

N requests are always open: where one ends, the next starts. A step does what the engine's does: the context tower
reads new prompts, the blocks that were finished in the step before, and the newest tokens of autoregressive requests,
all in one pass; then the denoiser runs over all open canvases, up to ``passes_per_step`` times, each time over those
that are not finished. With ``auto`` the step ends when a block is finished.
The last block of a request is never committed. In mode ``verified`` the denoiser drafts a block of every request that
has no prompt to read, in ``draft_steps`` passes, and the context tower verifies it, all in one step. Prompts are read
whole; memory is not limited.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from vllm_twotower.options import AUTO_PASSES_PER_STEP

from .accepted_tokens import AcceptedTokens
from .cost_model import CostModel, PlannedMode, Tower
from .steps_per_block import StepsPerBlock


@dataclass(frozen=True)
class Traffic:
    """``num_open`` requests with prompts of ``prompt_tokens`` tokens.

    They get ``output_blocks`` blocks of tokens on average: any number up to ``output_spread`` blocks more or less.
    Verified blocks are drafted in ``draft_steps`` passes, and so many tokens are ``accepted``.
    """

    num_open: int
    steps_per_block: StepsPerBlock
    prompt_tokens: int = 512
    output_blocks: int = 8
    output_spread: int = 4
    draft_steps: int = 1
    accepted: AcceptedTokens = AcceptedTokens((1.0,))


@dataclass
class SimulationResult:
    """What the measured stretch took; passes are of a tower, over any number of rows."""

    tokens: int = 0
    requests: int = 0
    seconds: float = 0.0
    engine_steps: int = 0
    context_passes: int = 0
    denoiser_passes: int = 0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def simulate(
    cost_model: CostModel,
    traffic: Traffic,
    mode: PlannedMode,
    *,
    passes_per_step: int | Literal["auto"] = 1,
    warm_up_requests: int = 0,
    measured_requests: int = 64,
    seed: int = 0,
) -> SimulationResult:
    """Runs until ``warm_up_requests`` requests have ended, then counts until ``measured_requests`` more have.

    The first ``num_open`` requests
    arrive at once; unless there is no spread, they end at any token, as if they had been open for a while.
    """
    return _Simulation(cost_model, traffic, mode, passes_per_step, seed).run(warm_up_requests, measured_requests)


class _Simulation:
    """The open requests, one entry each in arrays (N,)."""

    def __init__(
        self,
        cost_model: CostModel,
        traffic: Traffic,
        mode: PlannedMode,
        passes_per_step: int | Literal["auto"],
        seed: int,
    ):
        count = traffic.num_open
        self._cost_model, self._traffic, self._mode = cost_model, traffic, mode
        self._passes_per_step = passes_per_step
        self._random = np.random.default_rng(seed)
        self._to_read = np.ones(count, bool)
        self._pending = np.zeros(count, bool)
        self._passes_left = traffic.steps_per_block.sample(self._random, count)
        self._generated = np.zeros(count, int)
        self._target = self._output_tokens(count)
        if traffic.output_spread:
            self._target = self._random.integers(1, self._target + 1)
        self._result = SimulationResult()

    def _output_tokens(self, count: int) -> np.ndarray:
        mean, spread = self._traffic.output_blocks, self._traffic.output_spread
        return self._random.integers(mean - spread, mean + spread + 1, count) * self._cost_model.canvas_length

    def run(self, warm_up_requests: int, measured_requests: int) -> SimulationResult:
        while self._result.requests < warm_up_requests:
            self._step()
        self._result = SimulationResult()
        while self._result.requests < measured_requests:
            self._step()
        return self._result

    def _step(self) -> None:
        result = self._result
        result.engine_steps += 1
        result.seconds += self._cost_model.hardware.seconds_per_step
        before = self._generated.copy()
        if self._mode == "verified":
            self._verify()
        else:
            self._fill_blocks()
        self._to_read[:] = False
        result.tokens += int((np.minimum(self._generated, self._target) - before).sum())
        self._replace_ended()

    def _verify(self) -> None:
        """Every request gets its prompt's first token, or what is accepted of a draft and one more."""
        traffic, block = self._traffic, self._cost_model.canvas_length
        prompts, drafting = int(self._to_read.sum()), ~self._to_read
        if prompts:
            self._run("context", prompts, prompts * traffic.prompt_tokens, 0, prompts)
        rows = int(drafting.sum())
        if rows:
            in_cache = self._context_len()[drafting].sum()
            for _ in range(traffic.draft_steps):
                self._run("denoiser", rows, rows * block, in_cache, rows * block)
            self._run("context", rows, rows * block, in_cache, rows * block)
        self._generated += 1
        self._generated[drafting] += traffic.accepted.sample(self._random, rows)

    def _fill_blocks(self) -> None:
        """Passes until the step is over."""
        block = self._cost_model.canvas_length
        is_ar = self._mode == "ar"
        self._read_context(~self._to_read & is_ar, is_ar)
        self._pending[:] = False
        if is_ar:
            self._generated += 1  # a prompt's pass gives the first token
            return
        is_auto = self._passes_per_step == "auto"
        for count in range(AUTO_PASSES_PER_STEP if self._passes_per_step == "auto" else self._passes_per_step):
            canvases = self._passes_left > 0
            if not canvases.any() or (is_auto and count and not canvases.all()):
                break
            rows, tokens = int(canvases.sum()), int(canvases.sum()) * block
            self._run("denoiser", rows, tokens, self._context_len()[canvases].sum(), tokens)
            self._passes_left[canvases] -= 1
        finished = self._passes_left == 0
        self._passes_left[finished] = self._traffic.steps_per_block.sample(self._random, int(finished.sum()))
        self._pending |= finished
        self._generated[finished] += block

    def _context_len(self) -> np.ndarray:
        return self._traffic.prompt_tokens + self._generated

    def _read_context(self, newest: np.ndarray, with_head: bool) -> None:
        block = self._cost_model.canvas_length
        tokens = self._to_read * self._traffic.prompt_tokens + self._pending * block + newest
        rows = tokens > 0
        if rows.any():
            in_cache = np.where(self._to_read, 0, self._context_len() - tokens)[rows].sum()
            count = int(rows.sum())
            self._run("context", count, int(tokens.sum()), in_cache, count * with_head)

    def _run(self, tower: Tower, rows: int, tokens: int, context_tokens: int, head_rows: int) -> None:
        result = self._result
        result.seconds += self._cost_model.pass_cost(tower, rows, tokens, int(context_tokens), head_rows).seconds
        result.context_passes += tower == "context"
        result.denoiser_passes += tower == "denoiser"

    def _replace_ended(self) -> None:
        ended = np.flatnonzero(self._generated >= self._target)
        self._result.requests += len(ended)
        self._generated[ended] = 0
        self._pending[ended] = False
        self._to_read[ended] = True
        self._target[ended] = self._output_tokens(len(ended))
