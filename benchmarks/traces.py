"""What traces cost: tokens/s of requests that are traced, beside those of requests that are not, in one engine.

The two take turns, with a hundred requests a turn; each pair of turns gives a ratio:

    python benchmarks/traces.py --requests 1000 --open 64
"""

from __future__ import annotations

import argparse
import statistics
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from closed_loop import TINY, closed_loop, in_turns, problems, start
from summary import Summary

MODES: dict[str, dict[str, Any]] = {
    "mask_diffusion": {"diffusion_confidence_threshold": 0.8},
    "verified": {"diffusion_mode": "verified"},
    "ar": {"diffusion_mode": "ar"},
}
LEVELS = ("none", "tokens", "passes")
A_TURN = 100


def main() -> None:
    """Measures and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=TINY)
    parser.add_argument("--requests", type=int, default=1000, help="of each kind")
    parser.add_argument("--open", type=int, default=64, help="requests open at a time")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    Summary.add_argument(parser)
    args = parser.parse_args()
    summary, llm = Summary(args.summary), start(args.model, max_num_seqs=args.open)
    prompts = [problem["prompt"] for problem in islice(cycle(problems(args.model)), A_TURN)]
    print("| mode | diffusion_trace | tokens/s | of untraced, median | quartiles |\n|---|---|---|---|---|")
    for mode in args.modes:
        speeds = measured(llm, prompts, MODES[mode], args)
        for level in LEVELS:
            ratios = [one / other for one, other in zip(speeds[level], speeds["none"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            speed = statistics.median(speeds[level])
            print(f"| {mode} | {level} | {speed:.0f} | {middle:.3f} | {low:.3f} to {high:.3f} |", flush=True)
            if level != "none":
                summary.add(f"{mode}, trace {level}", speed, "untraced", speed / middle, "tokens/s")


def measured(llm: Any, prompts: list[str], options: dict[str, Any], args: argparse.Namespace) -> dict[str, list[float]]:
    """Tokens/s of every turn, by level."""
    from vllm import SamplingParams

    speeds: dict[str, list[float]] = {level: [] for level in LEVELS}
    closed_loop(llm, prompts, args.open, SamplingParams(temperature=0, max_tokens=64, extra_args=options))  # warm up
    for level in in_turns(LEVELS, max(2, args.requests // A_TURN)):
        params = SamplingParams(temperature=0, max_tokens=64, extra_args={**options, "diffusion_trace": level})
        speeds[level].append(closed_loop(llm, prompts, args.open, params).steady.tokens_per_second)
    return speeds


if __name__ == "__main__":
    main()
