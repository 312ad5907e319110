"""Where an engine step's time goes: the towers' forward passes, and everything around them by part.

The engine runs in this process, so there is no IPC; every part is timed in the same steps, and each figure is the
median over the steps in which only canvases (or only autoregressive rows) ran:

    python benchmarks/step_overhead.py --batch-sizes 1 4 16
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from closed_loop import TINY, problems, start
from summary import Summary

from vllm_twotower.offline import fastest_dtype

PARTS = ("scheduler", "prepare", "metadata", "towers", "heads", "sampler", "further", "post", "update", "detokenizer")


class Clock:
    """Seconds by part within the current step; a part's time excludes that of parts timed inside it."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._open: list[list[Any]] = []
        self._step: dict[str, float] = defaultdict(float)

    def wrap(self, holder: Any, name: str, part: str) -> None:
        """Times every call of ``holder.name``."""
        function = getattr(holder, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            self._open.append([0.0])
            try:
                return function(*args, **kwargs)
            finally:
                seconds = time.perf_counter() - start
                inside = self._open.pop()[0]
                self._step[part] += seconds - inside
                self._step[f"calls of {part}"] += 1
                if self._open:
                    self._open[-1][0] += seconds

        setattr(holder, name, timed)

    def step(self, function: Callable[[], Any]) -> Any:
        """Runs one step and keeps its times."""
        self._step = defaultdict(float)
        start = time.perf_counter()
        result = function()
        self._step["step"] = time.perf_counter() - start
        self.steps.append(self._step)
        return result


def main() -> None:
    """Measures and prints one table for each mode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=TINY)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--twotower", type=json.loads, default={}, help="engine options as JSON")
    Summary.add_argument(parser)
    args = parser.parse_args()
    summary = Summary(args.summary)

    llm = start(args.model, args.twotower, max_num_seqs=max(args.batch_sizes))
    clock = timed_parts(llm)
    prompts = [problem["prompt"] for problem in problems(args.model)]
    print(f"dtype {fastest_dtype()}; ms, medians over steps; further: tower passes of a step after the first;")
    print("around: all but towers, further and heads, per tower pass\n")
    columns = ("mode", "requests", "tokens/s", "passes", "step", *PARTS, "around")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for mode in ("mask_diffusion", "ar"):
        for batch_size in args.batch_sizes:
            run(llm, prompts[:batch_size], mode, args.max_tokens, clock)
            clock.steps.clear()
            rates = [run(llm, prompts[:batch_size], mode, args.max_tokens, clock) for _ in range(args.rounds)]
            steps = [step for step in clock.steps if step["towers"]]
            passes = [1 + step["calls of further"] for step in steps]
            medians = [statistics.median(step[part] for step in steps) * 1e3 for part in ("step", *PARTS)]
            around = statistics.median(
                (step["step"] - step["towers"] - step["further"] - step["heads"]) / count * 1e3
                for step, count in zip(steps, passes, strict=True)
            )
            figures = " | ".join(f"{value:.2f}" for value in (*medians, around))
            rate = statistics.median(rates)
            inside = statistics.median(
                (step["towers"] + step["further"] + step["heads"]) / count * 1e3
                for step, count in zip(steps, passes, strict=True)
            )
            summary.add(f"around a pass, {mode}, {batch_size} requests", around, "towers and heads", inside, "ms")
            print(f"| {mode} | {batch_size} | {rate:.0f} | {statistics.median(passes):.0f} | {figures} |", flush=True)


def timed_parts(llm: Any) -> Clock:
    """Puts a clock into the engine."""
    clock = Clock()
    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    clock.wrap(core.scheduler, "schedule", "scheduler")
    clock.wrap(core.scheduler, "update_from_output", "update")
    clock.wrap(core.scheduler, "update_draft_token_ids", "update")
    clock.wrap(runner, "execute_model", "prepare")
    clock.wrap(runner.model_state.planner, "plan", "metadata")
    clock.wrap(runner.model, "forward", "towers")
    clock.wrap(runner.model.logits_processor, "forward", "heads")
    clock.wrap(type(runner.sampler), "__call__", "sampler")
    clock.wrap(runner.model, "run", "further")
    clock.wrap(runner, "sample_tokens", "post")
    clock.wrap(llm.llm_engine.output_processor, "process_outputs", "detokenizer")
    return clock


def run(llm: Any, prompts: list[str], mode: str, max_tokens: int, clock: Clock) -> float:
    """Answers the prompts and returns tokens/s after the prompts' step."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, extra_args={"diffusion_mode": mode})
    for i, prompt in enumerate(prompts):
        engine.add_request(f"{i}", prompt, params)
    engine.step()
    start, tokens = time.perf_counter(), 0
    while engine.has_unfinished_requests():
        tokens += sum(len(o.outputs[0].token_ids) for o in clock.step(engine.step) if o.finished)
    return tokens / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
