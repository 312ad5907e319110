"""How ``diffusion_mode: auto`` chooses between autoregression and mask diffusion while the engine runs.

The cost model (:mod:`vllm_twotower.planning`) predicts what a block costs every open request in either mode. Its
hardware figures are fitted to the engine's own steps as they happen. Steps with and without the denoiser are kept
apart, so that a mode that is not in use is not forgotten; each mode is tried at the start, since the steps of one do
not tell what those of the other cost.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_twotower.checkpoint import TwoTowerConfig
from vllm_twotower.config import EngineOptions
from vllm_twotower.planning.cost_model import CostModel, Load
from vllm_twotower.planning.fit import HardwareFit, work
from vllm_twotower.planning.hardware import DEVICES, Hardware
from vllm_twotower.planning.mode_choice import ModeChooser, ModeDecision
from vllm_twotower.planning.step_policy import AUTO_PASSES_PER_STEP
from vllm_twotower.planning.steps_per_block import StepsPerBlock

from .rows import RowWork

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(__name__)

MARGIN = 0.04
"""The mode changes if the other is predicted to be faster by more than this share,"""
MIN_DWELL = 32
"""and not before so many decisions, at most one a step: while it changes, steps run both towers."""
REQUESTS_KEPT = 64
"""What all requests that ended weigh together in the means of prompts and texts, in requests."""
STEPS_TO_TRY = 16
"""Steps that each mode is measured in at the start, whatever is predicted."""
FORGET = 0.01
"""Share of their weight that older steps lose with each new one."""
STEPS_BETWEEN_FITS = 32
BLOCKS_KEPT = 200
"""What all blocks so far weigh together at most, in blocks."""
FIRST_PASSES_PER_BLOCK = 4
"""Assumed before a block was finished; counts as one."""


class ModeControl:
    """The mode that ``auto`` requests go on in at their next block border."""

    def __init__(self, vllm_config: VllmConfig, options: EngineOptions):
        model_config, parallel = vllm_config.model_config, vllm_config.parallel_config
        self._options = options
        self._ideal = _ideal_hardware()
        self._ideal_costs = CostModel(
            TwoTowerConfig.of(model_config.hf_config),
            self._ideal,
            tensor_parallel_size=parallel.tensor_parallel_size,
            dtype_bytes=model_config.dtype.itemsize,
        )
        self._fits = {mode: HardwareFit(self._ideal) for mode in ("ar", "mask_diffusion")}
        self._to_try = dict.fromkeys(self._fits, STEPS_TO_TRY)
        self._chooser = ModeChooser(self._ideal_costs, MARGIN, MIN_DWELL)
        self._steps_per_block = StepsPerBlock.of_mean(FIRST_PASSES_PER_BLOCK)
        self._blocks = Counter({FIRST_PASSES_PER_BLOCK: 1.0})
        self._num_ended = 0
        self._prompt_tokens = self._output_tokens = self._block_tokens = 0.0  # means of requests that ended
        self._num_measured = 0
        self._started = time.perf_counter()  # made within a step
        self._decision: ModeDecision | None = None
        self._decided_in = -1
        self._num_changes = 0

    def step_starts(self) -> None:
        """Starts the clock."""
        self._started = time.perf_counter()

    def step_ends(self, rows: Sequence[RowWork], blocks: Iterable[int]) -> None:
        """Takes a step's work and seconds into the fit; ``blocks`` are the passes of the blocks it finished."""
        seconds = time.perf_counter() - self._started
        self._blocks.update(blocks)
        if rows:
            mode = "mask_diffusion" if any(row.denoiser_passes for row in rows) else "ar"
            self._fits[mode].add(self._work(rows), seconds, FORGET)
            self._to_try[mode] -= 1
            self._num_measured += 1

    def request_ends(self, prompt_tokens: int, output_tokens: int) -> None:
        """Takes a request that ended into the means of prompts and texts; old ones lose weight."""
        if not output_tokens:
            return
        self._num_ended += 1
        share = max(1 / self._num_ended, 1 / REQUESTS_KEPT)
        width = self._options.canvas_length
        self._prompt_tokens += share * (prompt_tokens - self._prompt_tokens)
        self._output_tokens += share * (output_tokens - self._output_tokens)
        self._block_tokens += share * (-(-output_tokens // width) * width - self._block_tokens)

    def _load(self, num_open: int, context_len: float) -> Load:
        limit = self._options.denoise_steps_per_engine_step
        if limit == "auto":
            limit = AUTO_PASSES_PER_STEP if num_open == 1 else 1
        load = Load(num_open, context_len, self._steps_per_block, limit)
        if not self._num_ended:
            return load
        use = self._output_tokens / self._block_tokens
        return load._replace(prompt_tokens=self._prompt_tokens, output_tokens=self._output_tokens, block_use=use)

    def _work(self, rows: Sequence[RowWork]) -> np.ndarray:
        costs, passes = self._ideal_costs, []
        read = [row for row in rows if row.context_tokens]
        if read:
            tokens = sum(row.context_tokens for row in read)
            singles = sum(row.context_tokens == 1 for row in read)
            passes.append((costs.pass_cost("context", len(read), tokens, _context_len(read), singles), 1))
        for count in range(max((row.denoiser_passes for row in rows), default=0)):
            filled = [row for row in rows if row.denoiser_passes > count]
            tokens = sum(row.width for row in filled)
            passes.append((costs.pass_cost("denoiser", len(filled), tokens, _context_len(filled), tokens), 1))
        return work(self._ideal, 1, passes)

    def choose(self, step: int, num_open: int, context_len: float) -> ModeDecision:
        """Decides for the blocks that start after engine step ``step``; once for all of them.

        There are ``num_open`` requests of ``context_len`` tokens on average.
        """
        if self._decision is not None and self._decided_in == step:
            return self._decision
        if self._num_measured >= STEPS_BETWEEN_FITS:
            self._learn()
        before, self._decided_in = self._decision, step
        self._decision = self._chooser.choose(self._load(num_open, context_len))
        for mode, steps in self._to_try.items():
            if steps > 0:
                reason = f"{mode} is tried for {steps} more steps"
                self._decision = replace(self._decision, mode=mode, reason=reason)
                break
        if before is not None and before.mode != self._decision.mode:
            self._num_changes += 1
            logger.info("diffusion_mode auto: %s; %d open requests", self._decision.reason, num_open)
        return self._decision

    def _learn(self) -> None:
        """Puts what was measured into the cost model; older blocks lose weight, as older steps do."""
        self._chooser.cost_model = self._ideal_costs.on((self._fits["ar"] + self._fits["mask_diffusion"]).hardware())
        self._num_measured = 0
        total = sum(self._blocks.values())
        passes = sorted(self._blocks)
        self._steps_per_block = StepsPerBlock(tuple(passes), tuple(self._blocks[n] / total for n in passes))
        if total > BLOCKS_KEPT:
            self._blocks = Counter({n: count * BLOCKS_KEPT / total for n, count in self._blocks.items()})

    def take_changes(self) -> int:
        """How often the mode changed since the last call."""
        changes, self._num_changes = self._num_changes, 0
        return changes


def _context_len(rows: Sequence[RowWork]) -> int:
    return sum(row.context_len for row in rows)


def _ideal_hardware() -> Hardware:
    """The device's figures if they are known, else ones that no device reaches yet."""
    name = "CPU" if current_platform.is_cpu() else current_platform.get_device_name().upper()
    for device, hardware in DEVICES.items():
        if device.split("-")[0].upper() in name:
            return hardware
    if current_platform.is_cpu():
        return Hardware("CPU", 100e9, 2e12, 0, "assumed", overlaps=False)
    return Hardware(name, 10e12, 3e15, 0, "assumed")
