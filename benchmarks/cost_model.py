"""The cost model against the engine on this machine: fitted on some batch sizes, asked about others.

First come lock-step runs, n times the same prompt, so that every tower pass has exactly n rows: `LLM.get_metrics()`
counts the passes, and the fit gets their work with the seconds of the whole run. Then the fitted model and the
simulator predict the tokens/s of a closed loop of different prompts, with the steps per block that were measured.
Seconds are the CPU time of this process, where the whole engine runs; on one thread and an idle machine that is the
wall clock's time, on a shared one it leaves out most of what others do:

    python benchmarks/cost_model.py --fit-on 1 4 16 --predict 2 8
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

from closed_loop import TINY, closed_loop, problems
from summary import Summary

from vllm_twotower.architecture import TwoTowerConfig
from vllm_twotower.offline import fastest_dtype
from vllm_twotower.planning.cost_model import CostModel, PassCost
from vllm_twotower.planning.fit import HardwareFit, work
from vllm_twotower.planning.hardware import Hardware
from vllm_twotower.planning.simulator import Traffic, simulate
from vllm_twotower.planning.steps_per_block import METRIC, StepsPerBlock

# A step of an engine in this process is a call; elsewhere steps without a token would not be seen.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams

CPU = Hardware("CPU core", 10e9, 50e9, 16e9, "a guess, to start from", overlaps=False)
CONTEXT_PASSES, DENOISER_PASSES = "vllm:twotower_num_context_passes", "vllm:diffusion_num_denoising_steps"


@dataclass
class Measurement:
    """A run of n equal requests: engine steps, passes of either tower over all n rows, tokens, seconds."""

    variant: str
    batch: int
    steps: int
    context_passes: int
    denoiser_passes: int
    tokens: int
    seconds: float
    prompt_tokens: int

    def passes(self, model: CostModel) -> list[tuple[PassCost, float]]:
        """The passes as the cost model has them, at the mean length of the context."""
        n, context_len = self.batch, self.prompt_tokens + self.tokens / self.batch / 2
        is_ar = not self.denoiser_passes
        prompt = model.pass_cost("context", n, n * self.prompt_tokens, 0, n if is_ar else 0)
        others = model.ar_pass(n, context_len) if is_ar else model.commit_pass(n, context_len)
        return [
            (prompt, 1),
            (others, self.context_passes - 1),
            (model.denoiser_pass(n, context_len), self.denoiser_passes),
        ]


def main() -> None:
    """Measures, fits and prints three tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=TINY)
    parser.add_argument("--fit-on", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--predict", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.6, 0.95])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=fastest_dtype())
    parser.add_argument("--max-tokens", type=int, default=48, help="a multiple of the canvas length")
    parser.add_argument("--rounds", type=int, default=3)
    Summary.add_argument(parser)
    args = parser.parse_args()

    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(args.model),
        dtype=args.dtype,
        max_model_len=1024,
        max_num_seqs=max(args.fit_on + args.predict),
        max_num_batched_tokens=8192,
        kv_cache_memory_bytes=256 << 20,
        disable_log_stats=False,
    )
    config = TwoTowerConfig.from_pretrained(args.model)
    prompts = [problem["prompt"] for problem in problems(args.model)]

    def params(**options: float | str) -> SamplingParams:
        return SamplingParams(temperature=0, max_tokens=args.max_tokens, ignore_eos=True, extra_args=options)

    variants = {"AR": params(diffusion_mode="ar")}
    variants |= {f"threshold {t}": params(diffusion_confidence_threshold=t) for t in args.thresholds}

    # Rounds lie apart in time, so that what else the machine does for a while spoils one of each kind.
    rounds = [
        [
            lock_step(llm, prompts[0], batch, name, variant)
            for batch in sorted(args.fit_on + args.predict)
            for name, variant in variants.items()
        ]
        for _ in range(args.rounds + 1)
    ]
    measurements = [
        replace(runs[0], seconds=statistics.median(run.seconds for run in runs))
        for runs in zip(*rounds[1:], strict=True)  # the first one warms up
    ]

    fit, unfitted = HardwareFit(CPU), CostModel(config, CPU, dtype=args.dtype)
    for run in measurements:
        if run.batch in args.fit_on:
            fit.add(work(CPU, run.steps, run.passes(unfitted)), run.seconds)
    hardware = fit.hardware()
    model = CostModel(config, hardware, dtype=args.dtype)
    print_hardware(hardware)
    print_lock_step(model, measurements, args.fit_on)
    print_closed_loops(llm, model, prompts, variants, args.predict, Summary(args.summary))


def counts(llm: LLM) -> Counter[str]:
    """All counters of the engine; of the steps per block the sum, and the cumulative buckets as ``METRIC le``."""
    found: Counter[str] = Counter()
    for metric in llm.get_metrics():
        if hasattr(metric, "value"):
            found[metric.name] += metric.value
        elif metric.name == METRIC:
            found[metric.name] += metric.sum
            found.update({f"{METRIC} {bound}": count for bound, count in metric.buckets.items()})
    return found


def lock_step(llm: LLM, prompt: str, batch: int, variant: str, params: SamplingParams) -> Measurement:
    """Answers ``batch`` equal prompts, submitted at once."""
    before = counts(llm)
    loop = closed_loop(llm, [prompt] * batch, batch, params).whole
    done = counts(llm) - before
    if done[CONTEXT_PASSES] % batch or done[DENOISER_PASSES] % batch:
        raise RuntimeError(f"{batch} equal requests were not in step: {dict(done)}")
    return Measurement(
        variant,
        batch,
        loop.steps,
        done[CONTEXT_PASSES] // batch,
        done[DENOISER_PASSES] // batch,
        loop.tokens,
        loop.cpu_seconds,
        done["vllm:prompt_tokens"] // batch,
    )


def print_hardware(hardware: Hardware) -> None:
    """What was fitted."""
    bandwidth, flops = (
        "no time" if rate == inf else f"{rate / 1e9:.2f} {unit}"
        for rate, unit in ((hardware.memory_bandwidth, "GB/s"), (hardware.flops, "GFLOP/s"))
    )
    print(
        f"Fitted: memory {bandwidth}, arithmetic {flops}; ms: {hardware.seconds_per_step * 1e3:.2f} a step, "
        f"{hardware.seconds_per_context_pass * 1e3:.2f} a context pass, "
        f"{hardware.seconds_per_denoiser_pass * 1e3:.2f} a denoiser pass, {hardware.seconds_per_row * 1e3:.3f} a row"
    )


def print_lock_step(model: CostModel, measurements: Sequence[Measurement], fit_on: Sequence[int]) -> None:
    """Milliseconds of an engine step, measured and predicted."""
    print(f"\n{'requests':8} {'':15} {'steps':>6} {'tokens/s':>9} {'ms a step':>10} {'predicted':>10} {'off by':>7}")
    errors: dict[bool, list[float]] = {True: [], False: []}
    for run in measurements:
        predicted = run.steps * model.hardware.seconds_per_step
        predicted += sum(count * cost.seconds for cost, count in run.passes(model))
        error = predicted / run.seconds - 1
        errors[run.batch in fit_on].append(abs(error))
        print(
            f"{run.batch:8} {run.variant:15} {run.steps:6} {run.tokens / run.seconds:9.0f} "
            f"{run.seconds / run.steps * 1e3:10.2f} {predicted / run.steps * 1e3:10.2f} {error:+7.1%}"
            f"{'' if run.batch in fit_on else '  not fitted'}"
        )
    for fitted, found in errors.items():
        name = "fitted" if fitted else "not fitted"
        print(f"{name}: mean error {statistics.mean(found):.1%}, largest {max(found):.1%}")


def print_closed_loops(
    llm: LLM,
    model: CostModel,
    prompts: Sequence[str],
    variants: dict[str, SamplingParams],
    batch_sizes: Sequence[int],
    summary: Summary,
) -> None:
    """Tokens/s with different prompts in different phases, measured and simulated."""
    print(f"\n{'open':8} {'':15} {'passes/block':>12} {'tokens/s':>9} {'simulated':>10} {'off by':>7}")
    for num_open in batch_sizes:
        for name, params in variants.items():
            before, num_prompts = counts(llm), 4 * num_open + 16
            loop = closed_loop(llm, prompts[:num_prompts], num_open, params, num_open).steady
            done = counts(llm) - before
            is_ar = not done[DENOISER_PASSES]
            buckets = sorted(
                (float(key.split()[1]), count) for key, count in done.items() if key.startswith(f"{METRIC} ")
            )
            steps = StepsPerBlock.of_mean(1) if is_ar else StepsPerBlock.of_buckets(buckets, done[METRIC])
            traffic = Traffic(
                num_open,
                steps,
                round(done["vllm:prompt_tokens"] / num_prompts),
                params.max_tokens // model.canvas_length,
                output_spread=0,
            )
            result = simulate(
                model,
                traffic,
                "ar" if is_ar else "mask_diffusion",
                warm_up_requests=num_open,
                measured_requests=10 * num_open + 16,
                passes_per_step="auto",
            )
            measured, simulated = loop.tokens / loop.cpu_seconds, result.tokens_per_second
            print(
                f"{num_open:8} {name:15} {'' if is_ar else f'{steps.mean:.2f}':>12} {measured:9.0f} {simulated:10.0f} "
                f"{simulated / measured - 1:+7.1%}"
            )
            summary.add(f"simulated, {name}, {num_open} open", simulated, "measured", measured, "tokens/s")


if __name__ == "__main__":
    main()
