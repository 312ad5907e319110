"""Step times of one rank and of two, over processes and over Ray, in one run.

Every engine denoises once a step, so that a step is what ranks exchange figures for; they take turns. Without a Ray
cluster at RAY_ADDRESS the script starts one on this machine and ends it:

    python benchmarks/tensor_parallel.py --open 1 4 16
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from closed_loop import TINY, closed_loop, in_turns, problems, start
from summary import Summary

from vllm_twotower import ray_cluster
from vllm_twotower.offline import fastest_dtype

ENGINES = {
    "one rank": {},
    "two over mp": {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"},
    "two over ray": {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"},
}
PORT = 6390
"""Of the script's own cluster: not Ray's usual one."""


def main() -> None:
    """Measures and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=TINY)
    parser.add_argument("--open", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    Summary.add_argument(parser)
    args = parser.parse_args()
    with cluster():
        measure(args, Summary(args.summary))


@contextmanager
def cluster() -> Iterator[None]:
    """The cluster of the environment, or one of this script's own."""
    if "RAY_ADDRESS" in os.environ:
        yield
        return
    os.environ |= ray_cluster.start(2, PORT)
    try:
        yield
    finally:
        ray_cluster.end(PORT)


def measure(args: argparse.Namespace, summary: Summary) -> None:
    """The table, and its ratios for the summary."""
    from vllm import SamplingParams

    engines = {
        name: start(args.model, {"denoise_steps_per_engine_step": 1}, max_num_seqs=max(args.open), **options)
        for name, options in ENGINES.items()
    }
    prompts = [problem["prompt"] for problem in problems(args.model)]
    print(f"dtype {fastest_dtype()}; ms a step, medians of {args.rounds} rounds (lowest - highest)\n")
    print(f"| mode | open requests | {' | '.join(ENGINES)} | mp / one | ray / mp |\n|{'---|' * (len(ENGINES) + 4)}")
    for mode in ("mask_diffusion", "ar"):
        params = SamplingParams(
            temperature=0, max_tokens=args.max_tokens, ignore_eos=True, extra_args={"diffusion_mode": mode}
        )
        for num_open in args.open:
            times: dict[str, list[float]] = defaultdict(list)
            for name in in_turns(list(ENGINES), 1 + args.rounds):
                steady = closed_loop(engines[name], prompts[: 2 * num_open + 2], num_open, params).steady
                times[name].append(steady.seconds / steady.steps * 1e3)
            times = {name: values[1:] for name, values in times.items()}  # the first round warmed up
            one, mp, ray = (statistics.median(values) for values in times.values())
            figures = (
                f"{statistics.median(values):.2f} ({min(values):.2f} - {max(values):.2f})" for values in times.values()
            )
            print(f"| {mode} | {num_open} | {' | '.join(figures)} | {mp / one:.2f} | {ray / mp:.2f} |", flush=True)
            summary.add(f"step of two ranks over ray, {mode}, {num_open} open", ray, "over mp", mp, "ms")
            summary.add(f"step of two ranks over mp, {mode}, {num_open} open", mp, "one rank", one, "ms")
    for llm in engines.values():
        llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
