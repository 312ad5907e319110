"""What a tower pass, an engine step and a block of tokens cost: bytes, FLOPs, seconds.

Every figure is of one GPU. Formulas and units are in ``docs/planning.md``. The functions that a scheduler calls are
plain Python on floats, some microseconds each.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Literal, NamedTuple

from .accepted_tokens import AcceptedTokens
from .hardware import Hardware
from .model_size import WEIGHT_BYTES, ModelSize
from .steps_per_block import StepsPerBlock

if TYPE_CHECKING:
    from vllm_twotower.architecture import TwoTowerConfig

Tower = Literal["context", "denoiser"]
PlannedMode = Literal["ar", "mask_diffusion", "verified"]

USABLE_MEMORY = 0.9
"""Share of a GPU's memory for weights and caches; vLLM's default of --gpu-memory-utilization is 0.92."""

TOKENS_OF_ONE_REQUEST = 0.675
"""n tokens of one request touch as many experts as n ** 0.675 tokens that are routed independently.

From 210 denoiser passes of the released model, 23 layers each (github.com/junze-eng/twotower-repro, trace_moe.pkl):
6, 9.57, 15.4, 23.7 and 34.3 of 128 experts for 1, 2, 4, 8 and 16 tokens of a canvas."""

SHARED_BY_REQUESTS = 0.5
"""Of what the tokens of a request add to its first one, the share that all requests of a pass have in common.

From the same passes: 51.2 and 71.7 experts for 2 and 4 canvases. Of 8 and 16 canvases the trace has 89.1 and 102, and
the formula 101 and 122; its canvases are of 3 prompts only, so that their unions are low."""


class PassCost(NamedTuple):
    """One run of one tower: bytes read and written, FLOPs, and the seconds they take with every overhead.

    ``weight_bytes`` are of the experts really touched, the rest of the tower, and the head if any row needs it.
    ``link_seconds`` (in ``seconds``) is the time of the all-reduces. Products in a faster dtype than bf16 count in
    ``flops`` for as many as take the same time in bf16.
    """

    tower: Tower
    rows: float
    weight_bytes: float
    kv_bytes: float
    state_bytes: float
    flops: float
    link_seconds: float
    seconds: float

    @property
    def memory_bytes(self) -> float:
        return self.weight_bytes + self.kv_bytes + self.state_bytes


class Load(NamedTuple):
    """What a server has to do, on average.

    ``num_open`` requests with ``context_len`` tokens in the caches fill blocks in ``steps_per_block`` denoiser passes,
    one in an engine step. New prompts are read meanwhile: ``prompt_tokens`` for every ``output_tokens`` tokens
    generated; by default no request ever ends. Verified blocks are drafted in ``draft_steps`` passes, and ``accepted``
    tokens of a draft are right.
    """

    num_open: float
    context_len: float
    steps_per_block: StepsPerBlock
    prompt_tokens: float = 0.0
    output_tokens: float = inf
    draft_steps: int = 1
    accepted: AcceptedTokens = AcceptedTokens((1.0,))


class CostModel:
    """Predicts the seconds of passes, steps and blocks of one model on one kind of hardware.

    ``dtype`` (a key of ``WEIGHT_BYTES``) is that of activations, keys and values, and of all weights but those of
    ``linear_dtype`` and ``experts_dtype``: projections and shared experts, and routed experts.
    """

    def __init__(
        self,
        config: TwoTowerConfig,
        hardware: Hardware,
        *,
        tensor_parallel_size: int = 1,
        dtype: str = "bfloat16",
        linear_dtype: str | None = None,
        experts_dtype: str | None = None,
        ssm_dtype: str = "float32",
    ):
        linear_dtype, experts_dtype = linear_dtype or dtype, experts_dtype or dtype
        dtype_bytes = WEIGHT_BYTES[dtype]
        self.hardware = hardware
        self.canvas_length = config.canvas_length
        self.size = ModelSize.of(
            config,
            tensor_parallel_size,
            dtype_bytes,
            WEIGHT_BYTES[experts_dtype],
            WEIGHT_BYTES[ssm_dtype],
            WEIGHT_BYTES[linear_dtype],
        )
        self._skipped = 1 - config.num_experts_per_tok / self.size.num_experts if self.size.num_experts else 1.0
        self._left_out_block = self._left_out(self.canvas_length)
        linear, experts = (1 / hardware.speedups.get(name, 1.0) for name in (linear_dtype, experts_dtype))
        active_experts = self.size.num_moe_layers * config.num_experts_per_tok * self.size.expert_parameters
        # A state element is decayed, fed (a product and a sum) and read (again both): 5 FLOPs a token.
        states = config.pattern.count("M") * config.mamba_intermediate_size * config.ssm_state_size
        dense = self.size.dense_parameters - self.size.linear_parameters * (1 - linear)
        self._flops_per_token = 2 * (dense + experts * active_experts) + 5 * states / tensor_parallel_size
        query_width = config.num_attention_heads * config.head_dim / tensor_parallel_size
        self._flops_per_token_and_key = 4 * config.pattern.count("*") * query_width
        # A sum over the GPUs after the embedding and after every layer.
        num_sums = len(config.pattern) + 1 if tensor_parallel_size > 1 else 0
        self._link_seconds_per_pass = num_sums * hardware.link_latency
        ring = 2 * (tensor_parallel_size - 1) / tensor_parallel_size
        self._link_seconds_per_token = num_sums * ring * config.hidden_size * dtype_bytes / hardware.link_bandwidth

    def _left_out(self, tokens: float) -> tuple[float, float]:
        """``first`` and ``each``: R requests with ``tokens`` tokens each leave out first * each**R of the experts."""
        effective = tokens**TOKENS_OF_ONE_REQUEST
        shared = SHARED_BY_REQUESTS * (effective - 1)
        return self._skipped**shared, self._skipped ** (effective - shared)

    def experts_touched(self, rows: float, tokens: float) -> float:
        """Distinct experts of a layer that ``rows`` requests with ``tokens`` tokens in all are routed to, on average.

        E (1 - (1 - k/E)^T) of T independent tokens: T = R n^a - (R - 1) s (n^a - 1) for R requests of n tokens, with
        a = :data:`TOKENS_OF_ONE_REQUEST` and s = :data:`SHARED_BY_REQUESTS`. Single tokens of R requests are T = R.
        """
        first, each = self._left_out(tokens / rows)
        return self.size.num_experts * (1 - first * each**rows)

    def _commits_seconds(self, batch: float, probability: float, context_len: float) -> float:
        """Mean seconds for the blocks of ``batch`` requests, each finished with ``probability``; 0 if none is.

        The mean number of rows stands for all but the experts they touch: the first rows touch the most, so that the
        mean number of them would touch more.
        """
        none = (1 - probability) ** batch
        if none == 1:
            return 0.0
        first, each = self._left_out_block
        left_out = (1 - probability + probability * each) ** batch
        experts = self.size.num_experts * (1 - first * (left_out - none) / (1 - none))
        rows = batch * probability / (1 - none)
        tokens = rows * self.canvas_length
        return (1 - none) * self._pass_cost("context", rows, tokens, rows * context_len, 0, experts).seconds

    def pass_cost(self, tower: Tower, rows: float, tokens: float, context_tokens: float, head_rows: float) -> PassCost:
        """One run of ``tower`` over ``rows`` requests with ``tokens`` tokens in all.

        ``context_tokens`` is the sum of what the rows have in the caches already, ``head_rows`` the number of tokens
        that need logits.
        """
        return self._pass_cost(tower, rows, tokens, context_tokens, head_rows, self.experts_touched(rows, tokens))

    def _pass_cost(
        self, tower: Tower, rows: float, tokens: float, context_tokens: float, head_rows: float, experts: float
    ) -> PassCost:
        size, hardware = self.size, self.hardware
        is_context = tower == "context"
        weight_bytes = size.dense_bytes + size.num_moe_layers * experts * size.expert_bytes
        if head_rows:
            weight_bytes += size.head_bytes
        flops = tokens * (self._flops_per_token + self._flops_per_token_and_key * (context_tokens + tokens) / rows)
        flops += 2 * head_rows * size.head_parameters
        if not is_context:
            weight_bytes += size.time_bytes
            flops += 2 * rows * size.time_parameters
        kv_bytes = (context_tokens + tokens) * size.kv_bytes_per_token
        # The context tower also writes its states back.
        state_bytes = rows * size.state_bytes * (2 if is_context else 1)
        link_seconds = self._link_seconds_per_pass + tokens * self._link_seconds_per_token
        overhead = hardware.seconds_per_context_pass if is_context else hardware.seconds_per_denoiser_pass
        seconds = (
            hardware.roofline_seconds(weight_bytes + kv_bytes + state_bytes, flops)
            + link_seconds
            + overhead
            + rows * hardware.seconds_per_row
        )
        return PassCost(tower, rows, weight_bytes, kv_bytes, state_bytes, flops, link_seconds, seconds)

    def ar_pass(self, batch: float, context_len: float) -> PassCost:
        """The context tower over the newest token of each of ``batch`` requests."""
        return self.pass_cost("context", batch, batch, batch * context_len, batch)

    def denoiser_pass(self, batch: float, context_len: float) -> PassCost:
        """The denoiser over the canvases of ``batch`` requests."""
        tokens = batch * self.canvas_length
        return self.pass_cost("denoiser", batch, tokens, batch * context_len, tokens)

    def commit_pass(self, batch: float, context_len: float) -> PassCost:
        """The context tower over the finished blocks of ``batch`` requests; no logits are needed."""
        return self.pass_cost("context", batch, batch * self.canvas_length, batch * context_len, 0)

    def verify_pass(self, batch: float, context_len: float) -> PassCost:
        """The context tower over the drafts of ``batch`` requests, with logits of every token."""
        tokens = batch * self.canvas_length
        return self.pass_cost("context", batch, tokens, batch * context_len, tokens)

    def block_seconds(self, mode: PlannedMode, load: Load) -> float:
        """Seconds until each of the open requests has, on average, one canvas length of tokens more."""
        of_mode = {
            "ar": self._ar_block_seconds,
            "mask_diffusion": self._diffusion_block_seconds,
            "verified": self._verified_block_seconds,
        }
        return of_mode[mode](load)

    def _verified_block_seconds(self, load: Load) -> float:
        """A request takes one step for its prompt, which gives the first token, and one for each draft.

        In a step all that have no prompt to read draft a block, and the context tower verifies it.
        """
        context_len, given = load.context_len, 1 + load.accepted.mean
        steps = 1 + (load.output_tokens - 1 + load.accepted.excess) / given  # of a request
        starts = 1 / steps
        batch = load.num_open * (1 - starts)
        step = self.hardware.seconds_per_step + self.verify_pass(batch, context_len).seconds
        step += load.draft_steps * self.denoiser_pass(batch, context_len).seconds
        some_start = 1 - (1 - starts) ** load.num_open
        if some_start and load.prompt_tokens:
            starting = load.num_open * starts / some_start
            step += some_start * self.pass_cost("context", starting, starting * load.prompt_tokens, 0, starting).seconds
        tokens_a_step = given if load.output_tokens == inf else load.output_tokens / steps
        return self.canvas_length * step / tokens_a_step

    def _ar_block_seconds(self, load: Load) -> float:
        """A step gives every request a token; in some steps new prompts are read in the same pass.

        The prompt's pass gives the first token, so that a step of B requests starts B / output_tokens on average.
        """
        batch, context_len = load.num_open, load.context_len
        step = self.ar_pass(batch, context_len).seconds
        some_start = 1 - (1 - 1 / load.output_tokens) ** batch
        if some_start and load.prompt_tokens:
            starting = batch / load.output_tokens / some_start
            old = batch - starting
            tokens = old + starting * load.prompt_tokens
            with_prompts = self.pass_cost("context", batch, tokens, old * context_len, batch).seconds
            step += some_start * (with_prompts - step)
        return self.canvas_length * (self.hardware.seconds_per_step + step)

    def _diffusion_block_seconds(self, load: Load) -> float:
        """A request goes through s steps a block; its last block is not committed.

        Requests are in different phases. In a step, the context tower commits whatever was finished in the step before,
        and reads what prompts there are; then the denoiser makes a pass over all canvases, those of new prompts too.
        """
        batch, context_len = load.num_open, load.context_len
        steps = load.steps_per_block.mean
        prompts_per_block = min(1.0, self.canvas_length / load.output_tokens)
        starts, commits = prompts_per_block / steps, (1 - prompts_per_block) / steps  # of a request, in a step
        some_start = 1 - (1 - starts) ** batch
        step = self.hardware.seconds_per_step
        if commits:
            step += (1 - some_start) * self._commits_seconds(batch, commits / (1 - starts), context_len)
        if some_start:
            starting, committing = batch * starts / some_start, batch * commits
            tokens = starting * load.prompt_tokens + committing * self.canvas_length
            context_tokens = committing * context_len
            step += some_start * self.pass_cost("context", starting + committing, tokens, context_tokens, 0).seconds
        return steps * (step + self.denoiser_pass(batch, context_len).seconds)

    def tokens_per_second(self, mode: PlannedMode, load: Load) -> float:
        """Tokens/s of all open requests together."""
        return load.num_open * self.canvas_length / self.block_seconds(mode, load)

    def crossovers(
        self, load: Load, max_open: int = 1024, mode: PlannedMode = "mask_diffusion"
    ) -> list[tuple[int, int]]:
        """The windows, first and last number of open requests in 1 ... ``max_open``, where ``mode`` is faster than AR.

        ``load.num_open`` does not matter.
        """
        windows: list[tuple[int, int]] = []
        for num_open in range(1, max_open + 1):
            at = load._replace(num_open=num_open)
            if self.block_seconds(mode, at) >= self._ar_block_seconds(at):
                continue
            if windows and windows[-1][1] == num_open - 1:
                windows[-1] = (windows[-1][0], num_open)
            else:
                windows.append((num_open, num_open))
        return windows

    def max_requests(self, context_len: int) -> int:
        """Requests of ``context_len`` tokens that fit beside the weights in :data:`USABLE_MEMORY` of a GPU's memory."""
        left = self.hardware.memory_bytes * USABLE_MEMORY - self.size.weight_bytes
        return max(0, int(left // self.size.request_bytes(context_len)))
