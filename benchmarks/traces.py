"""What traces cost: tokens/s of requests that are traced, beside those of requests that are not, in one engine.

They take turns, with a hundred requests a turn. The ratio is that of all tokens by all seconds; the quartiles are those
of the turns' own ratios:

    python benchmarks/traces.py --requests 1000 --open 64
"""

from __future__ import annotations

import argparse
import statistics
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from closed_loop import TINY, Stretch, closed_loop, in_turns, problems, start
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
    print("| mode | diffusion_trace | tokens/s | of untraced | quartiles of turns |\n|---|---|---|---|---|")
    for mode in args.modes:
        turns = measured(llm, prompts, MODES[mode], args)
        speed = {level: sum(t.tokens for t in of) / sum(t.seconds for t in of) for level, of in turns.items()}
        for level, of_level in turns.items():
            pairs = zip(of_level, turns["none"], strict=True)
            low, _, high = statistics.quantiles([a.tokens_per_second / b.tokens_per_second for a, b in pairs], n=4)
            ratio = speed[level] / speed["none"]
            print(f"| {mode} | {level} | {speed[level]:.0f} | {ratio:.3f} | {low:.3f} to {high:.3f} |", flush=True)
            if level != "none":
                summary.add(f"{mode}, trace {level}", speed[level], "untraced", speed["none"], "tokens/s")


def measured(
    llm: Any, prompts: list[str], options: dict[str, Any], args: argparse.Namespace
) -> dict[str, list[Stretch]]:
    """The turns of each level."""
    from vllm import SamplingParams

    turns: dict[str, list[Stretch]] = {level: [] for level in LEVELS}
    closed_loop(llm, prompts, args.open, SamplingParams(temperature=0, max_tokens=64, extra_args=options))  # warm up
    for level in in_turns(LEVELS, max(2, args.requests // A_TURN)):
        params = SamplingParams(temperature=0, max_tokens=64, extra_args={**options, "diffusion_trace": level})
        turns[level].append(closed_loop(llm, prompts, args.open, params).whole)
    return turns


if __name__ == "__main__":
    main()
