"""Seconds to a request's first block and between its blocks: under load, and with long prompts arriving.

Closed loops with 1 to 64 open requests; then ``--beside`` requests generate long texts, first alone, then while prompts
of ``--prompt-tokens`` tokens arrive one after the other. The last figure is the ratio of the gaps' 99th percentiles:

    python benchmarks/latency.py --engines '{"prompt_tokens_beside_blocks": 2048}'
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from closed_loop import TINY, Outcome, closed_loop, problems, start
from summary import Summary

from vllm_twotower.offline import fastest_dtype

if TYPE_CHECKING:
    from vllm import LLM


def main() -> None:
    """Measures and prints two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=TINY)
    parser.add_argument("--open", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--beside", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each stretch of the mixed load")
    parser.add_argument("--engines", type=json.loads, nargs="*", default=[], help="options of further engines")
    Summary.add_argument(parser)
    args = parser.parse_args()
    summary = Summary(args.summary)

    engines = {
        json.dumps(options): start(args.model, options, max_num_seqs=max(*args.open, args.beside + 2))
        for options in [{}, *args.engines]
    }
    print(f"dtype {fastest_dtype()}\n")
    print("| engine | open | first block, median ms | p99 | between blocks, median ms | p99 |")
    print("|---|---|---|---|---|---|")
    seconds: dict[tuple[str, int], float] = {}
    for num_open in args.open:
        for name, llm in engines.items():
            outcome = load(llm, args.model, num_open)
            print(f"| {name} | {num_open} | {_figures(outcome.firsts)} | {_figures(outcome.gaps)} |", flush=True)
            seconds[name, num_open] = float(np.median(outcome.firsts))
            summary.add(
                f"first block, {num_open} open, {name}",
                seconds[name, num_open],
                f"{args.open[0]} open",
                seconds[name, args.open[0]],
                "s",
            )
    print(f"\n| engine | between blocks, median ms | p99 | with prompts of {args.prompt_tokens} | p99 | p99's ratio |")
    print("|---|---|---|---|---|---|")
    for name, llm in engines.items():
        mixed(llm, args.beside, args.prompt_tokens, 3.0)  # warm up
        alone = mixed(llm, args.beside, 0, args.seconds)
        loaded = mixed(llm, args.beside, args.prompt_tokens, args.seconds)
        slow, usual = np.percentile(loaded, 99), np.percentile(alone, 99)
        print(f"| {name} | {_figures(alone)} | {_figures(loaded)} | {slow / usual:.2f} |", flush=True)
        summary.add(f"p99 gap beside long prompts, {name}", slow, "alone", usual, "s")


def load(llm: LLM, model: Path, num_open: int) -> Outcome:
    """What a closed loop gives."""
    from vllm import SamplingParams

    prompts = [problem["prompt"] for problem in problems(model)][: max(24, 2 * num_open)]
    params = SamplingParams(temperature=0, max_tokens=64)
    closed_loop(llm, prompts, num_open, params)
    return closed_loop(llm, prompts, num_open, params)


def mixed(llm: LLM, num_beside: int, prompt_tokens: int, seconds: float) -> list[float]:
    """Gaps between blocks of ``num_beside`` requests; one prompt of so many tokens is read at any time, if any."""
    from vllm import SamplingParams

    engine, gaps = llm.llm_engine, []
    text = SamplingParams(temperature=0, max_tokens=1500, ignore_eos=True)
    short = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    last: dict[str, float] = {}
    count = 0

    def add(kind: str, tokens: int, params: SamplingParams) -> None:
        nonlocal count
        count += 1
        engine.add_request(f"{kind}{count}", {"prompt_token_ids": [10 + count % 7] * tokens}, params)

    for _ in range(num_beside):
        add("text", 8 + count, text)
    if prompt_tokens:
        add("prompt", prompt_tokens, short)
    end = time.perf_counter() + seconds
    while (now := time.perf_counter()) < end:
        for output in engine.step():
            now = time.perf_counter()
            if output.request_id.startswith("text"):
                if output.request_id in last:
                    gaps.append(now - last[output.request_id])
                last[output.request_id] = now
                if output.finished:
                    add("text", 8 + count % 7, text)
            elif output.finished:
                add("prompt", prompt_tokens, short)
    engine.abort_request([f"{kind}{i}" for kind in ("text", "prompt") for i in range(1, count + 1)])
    while engine.has_unfinished_requests():
        engine.step()
    return gaps


def _figures(seconds: list[float]) -> str:
    if not seconds:
        return "- | -"
    return f"{np.median(seconds) * 1e3:.0f} | {np.percentile(seconds, 99) * 1e3:.0f}"


if __name__ == "__main__":
    main()
