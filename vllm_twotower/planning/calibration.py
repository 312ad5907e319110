"""The cost model against times that others have published of the released model, one overhead fitted to each machine.

Their programs launch kernels one by one; the overhead is the seconds of a launch, times launches counted in their code.
The memory and arithmetic of a pass are the cost model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from .cost_model import CostModel, PassCost
from .hardware import ACHIEVED_BANDWIDTH, DEVICES, Hardware
from .texts import MEAN_PASSES

if TYPE_CHECKING:
    from vllm_twotower.architecture import TwoTowerConfig


class Program(NamedTuple):
    """How a program runs a tower: launches a layer (about), a loop in Python over experts, a scan token by token.

    Hugging Face's 48 are counted in the repository for two GB10 below; vLLM's 28 and MLX's 48 are estimates.
    """

    launches_per_layer: int
    loops_over_experts: bool = False
    scans_by_token: bool = False

    def launches(self, model: CostModel, config: TwoTowerConfig, requests: int, tokens: int) -> float:
        """Launches of a pass.

        The loop takes 3 for every expert, to find its tokens, and 8 more for one that has any; the scan 8 a token,
        where there is more than one. Counted in modeling_nemotron_h.py and tt_kernels.py of the same repository.
        """
        count = float(self.launches_per_layer * len(config.pattern))
        if self.loops_over_experts:
            touched = model.experts_touched(requests, tokens)
            count += config.pattern.count("E") * (3 * config.n_routed_experts + 8 * touched)
        if self.scans_by_token and tokens > requests:
            count += config.pattern.count("M") * 8 * tokens
        return count


HUGGING_FACE = Program(48, loops_over_experts=True, scans_by_token=True)
ONE_KERNEL = HUGGING_FACE._replace(loops_over_experts=False)
VLLM_EAGER, MLX = Program(28), Program(48)


@dataclass(frozen=True)
class Passes:
    """Passes of one kind: ``ar``, ``denoiser``, ``block`` (16 tokens read by the context tower) or ``prompt``."""

    kind: str
    count: float = 1.0
    requests: int = 1
    prompt_tokens: int = 0


@dataclass(frozen=True)
class Published:
    """A time in seconds for some passes. ``off`` says why it is left out of the fit, if it is."""

    what: str
    seconds: float
    passes: Sequence[Passes]
    program: Program
    linear_dtype: str = "bfloat16"
    experts_dtype: str = "bfloat16"
    off: str = ""


AR, DENOISER, BLOCK = Passes("ar"), Passes("denoiser"), Passes("block")
_SIMILAR = "so many bytes cannot be read in that time: these 8 requests shared experts, as similar prompts do"
_PREFILL = "eager kernels, far from the rate of matrix products that is taken"
_PASSES = "passes a block not stated (10.5 taken), the program not known"
_OPEN_BLOCK = (Passes("denoiser", MEAN_PASSES["open"]), BLOCK)

M3_ULTRA = Hardware(
    "M3 Ultra", 819e9 * ACHIEVED_BANDWIDTH, 28e12, 512e9, "Apple's technical specifications; arithmetic assumed"
)
PUBLISHED = {
    # github.com/junze-eng/twotower-repro
    "2 x A100 80 GB, a tower each": (
        DEVICES["A100-80GB"],
        [
            Published("AR step, Hugging Face code", 0.239, [AR], HUGGING_FACE),
            Published("denoiser pass, the same", 0.436, [DENOISER], HUGGING_FACE),
        ],
    ),
    # github.com/drowzeys/Keys-NVIDIA-Two-Tower-Diffusion--dual-dgx-spark: profile in data/optimized_results.json;
    # with vLLM, the context tower alone: github.com/drowzeys/Keys-NVIDIA-Two-Tower-AR--single-dgx-spark
    "GB10": (
        DEVICES["GB10"],
        [
            Published("denoiser pass, Hugging Face code", 0.1745, [DENOISER], HUGGING_FACE),
            Published("the same, experts in one kernel", 0.1035, [DENOISER], ONE_KERNEL),
            Published("AR step, vLLM eager, 1 request", 1 / 26.3, [AR], VLLM_EAGER),
            Published("the same, 2 requests", 2 / 43.7, [Passes("ar", requests=2)], VLLM_EAGER),
            Published("the same, 4 requests", 4 / 56.1, [Passes("ar", requests=4)], VLLM_EAGER),
            Published("the same, 8 requests", 8 / 163.7, [Passes("ar", requests=8)], VLLM_EAGER, off=_SIMILAR),
            Published("prompt of 256K tokens", 186, [Passes("prompt", prompt_tokens=2**18)], VLLM_EAGER, off=_PREFILL),
        ],
    ),
    # The first repository for GB10, whole runs in data/nvfp4_results.json and optimized_results.json: the time of all
    # tokens by their number, or by that of denoiser passes.
    "2 x GB10, a tower each": (
        DEVICES["GB10"],
        [
            Published("AR step, bf16", 0.060, [AR], ONE_KERNEL),
            Published("AR step, NVFP4 experts", 0.046, [AR], ONE_KERNEL, experts_dtype="nvfp4"),
            Published(
                "denoiser pass and its share of blocks read, NVFP4 experts (80 to 100 ms)",
                0.090,
                [DENOISER, Passes("block", 16 / 66)],
                ONE_KERNEL,
                experts_dtype="nvfp4",
            ),
        ],
    ),
    # A port to MLX; its repository is not known.
    "M3 Ultra": (
        M3_ULTRA,
        [
            Published("AR step, bf16", 1 / 13.3, [AR], MLX),
            Published("AR step, 4 bits", 1 / 16.1, [AR], MLX, "int4", "int4"),
            Published("block of 16 tokens, bf16", 16 / 1.5, _OPEN_BLOCK, MLX, off=_PASSES),
            Published("block of 16 tokens, 4 bits", 16 / 3.8, _OPEN_BLOCK, MLX, "int4", "int4", off=_PASSES),
        ],
    ),
}
"""By machine: its hardware and what was measured there."""


class Compared(NamedTuple):
    """A published time beside the predicted one, in seconds."""

    published: Published
    predicted: float

    @property
    def error(self) -> float:
        """Share by which the prediction is off."""
        return self.predicted / self.published.seconds - 1


def compare(config: TwoTowerConfig, machine: str) -> tuple[float, list[Compared]]:
    """The fitted seconds of a launch on a machine of :data:`PUBLISHED`, and all its times beside the predicted ones.

    Least squares of relative errors: each time is (seconds without overhead) + launches x (seconds of a launch).
    """
    hardware, times = PUBLISHED[machine]
    ideal = [_work(config, hardware, time) for time in times]
    fitted = [(work, time.seconds) for work, time in zip(ideal, times, strict=True) if not time.off]
    moment = sum(launches / t * (1 - seconds / t) for (seconds, launches), t in fitted)
    launch = max(0.0, moment / sum((launches / t) ** 2 for (_, launches), t in fitted))
    return launch, [
        Compared(time, seconds + launches * launch) for time, (seconds, launches) in zip(times, ideal, strict=True)
    ]


def _work(config: TwoTowerConfig, hardware: Hardware, time: Published) -> tuple[float, float]:
    """Seconds of the passes without overhead, and their launches."""
    model = CostModel(config, hardware, linear_dtype=time.linear_dtype, experts_dtype=time.experts_dtype)
    seconds = launches = 0.0
    for passes in time.passes:
        cost, tokens = _cost(model, passes)
        seconds += passes.count * cost.seconds
        launches += passes.count * time.program.launches(model, config, passes.requests, tokens)
    return seconds, launches


def _cost(model: CostModel, passes: Passes) -> tuple[PassCost, int]:
    """A pass without context, and its tokens."""
    requests, block = passes.requests, model.canvas_length
    if passes.kind == "prompt":
        return model.pass_cost("context", 1, passes.prompt_tokens, 0, 1), passes.prompt_tokens
    if passes.kind == "ar":
        return model.ar_pass(requests, 0), requests
    cost = model.denoiser_pass(requests, 0) if passes.kind == "denoiser" else model.commit_pass(requests, 0)
    return cost, requests * block


def calibration_table(config: TwoTowerConfig) -> str:
    """All published times as a Markdown table."""
    lines = ["| machine | published | ms | predicted | off by | |", "|---|---|---|---|---|---|"]
    for machine in PUBLISHED:
        launch, rows = compare(config, machine)
        for i, row in enumerate(rows):
            name = f"{machine}: {launch * 1e6:.1f} us a launch" if not i else ""
            time = row.published
            lines.append(
                f"| {name} | {time.what} | {time.seconds * 1e3:,.1f} | {row.predicted * 1e3:,.1f} | {row.error:+.0%} | "
                f"{f'not fitted: {time.off}' if time.off else ''} |"
            )
    return "\n".join(lines)


def calibration_data(config: TwoTowerConfig) -> list[dict[str, Any]]:
    """The same as plain data, in seconds."""
    found = []
    for machine in PUBLISHED:
        launch, rows = compare(config, machine)
        times = [
            {"what": row.published.what, "seconds": row.published.seconds, "predicted": row.predicted} for row in rows
        ]
        found.append({"machine": machine, "seconds_per_launch": launch, "times": times})
    return found
