"""Tokens/s, tokens per tower pass and right answers: mask diffusion, verified drafts, autoregression, auto, plain loop.

Closed loops of the tiny model's held-out problems with 1 to 64 requests open, or with ``--unknown`` of beginnings of
texts that it was not trained on. All variants take turns, each figure is
the median of its rounds, and the third column is the ratio to autoregression in the same engine and run:

    python benchmarks/throughput.py --open 1 4 16 64 --thresholds 0.5 0.7 0.8 0.9 0.95

With ``--released`` a block takes as many passes as the released model's do (``released_passes.py``), at no threshold.

With ``--engines`` other engines are measured beside the first, to compare their options (as JSON, one each):

    python benchmarks/throughput.py --thresholds 0.8 --engines '{"denoise_steps_per_engine_step": 1}'
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from closed_loop import TINY, Outcome, Stretch, closed_loop, in_turns, metric_values, problems, start
from released_passes import RELEASED, register
from summary import Summary

from vllm_twotower.offline import fastest_dtype
from vllm_twotower.training.problems import stated_result

if TYPE_CHECKING:
    from vllm import LLM

DENOISER, CONTEXT = "vllm:diffusion_num_denoising_steps", "vllm:twotower_num_context_passes"
AR, PLAIN = "ar", "plain loop"
PLAIN_AR = f"{PLAIN}, {AR}"
TITLES = ("def add(a, b):\n    ", "import os\n", "Once upon a time", "The class", "SELECT name FROM", "Dear Sir,\n")
UNKNOWN = [{"prompt": f"{title}{'#' * (i // len(TITLES))}", "result": ""} for i, title in enumerate(TITLES * 24)]


def main() -> None:
    """Measures and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=TINY)
    parser.add_argument("--open", type=int, nargs="+", default=[1, 4, 16, 64], help="requests open at a time")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.5, 0.6, 0.7, 0.8, 0.9, 0.95])
    parser.add_argument("--engines", type=json.loads, nargs="*", default=[], help="options of further engines")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--released", action="store_true", help="the released model's passes per block")
    parser.add_argument("--unknown", action="store_true", help="texts that the model was not trained on")
    parser.add_argument("--reference", action="store_true", help="also measure the plain PyTorch loop")
    Summary.add_argument(parser)
    args = parser.parse_args()
    summary = Summary(args.summary)
    if args.released:
        register()

    asked = UNKNOWN if args.unknown else problems(args.model)
    variants = {}
    for options in [*args.engines, {}]:
        llm = start(args.model, options, max_num_seqs=max(args.open))
        name = ", ".join(f"{key} {value}" for key, value in options.items())
        # vLLM's metrics of this process are those of the newest engine.
        of_engine = engine_variants(llm, args, counts_passes=not options)
        variants |= {f"{variant} {name}".strip(): run for variant, run in of_engine.items()}
    if args.reference:
        variants |= reference_variants(args)
    print(f"dtype {fastest_dtype()}; {args.rounds} rounds; a pass is one tower's run over one request's row\n")
    print("| open | variant | tokens/s | of AR | tokens/pass | right | tower passes |")
    print("|---|---|---|---|---|---|---|")
    for num_open in args.open:
        measure(variants, asked[: min(len(asked), max(24, 2 * num_open))], num_open, args.rounds, middle(args), summary)


Run = Callable[[Sequence[str], int], tuple[Outcome, float]]
"""Answers prompts, so many at a time; gives the outcome and the tower passes."""


def measure(
    variants: dict[str, Run],
    asked: list[dict[str, Any]],
    num_open: int,
    rounds: int,
    threshold: float,
    summary: Summary,
) -> None:
    """Prints the rows of one load; ``threshold`` is that of the plain loop."""
    prompts = [problem["prompt"] for problem in asked]
    for run in variants.values():
        run(prompts[: num_open + 1], num_open)  # warm up
    results: dict[str, list[tuple[Outcome, float]]] = {name: [] for name in variants}
    for name in in_turns(list(variants), rounds):
        results[name].append(variants[name](prompts, num_open))
    speed = {name: statistics.median(o.steady.tokens_per_second for o, _ in runs) for name, runs in results.items()}
    ar_outcome, ar_passes = results[AR][0]
    ar_tokens_per_pass = ar_outcome.whole.tokens / ar_passes
    for name, runs in results.items():
        outcome, passes = runs[0]
        right = sum(problem["result"] == stated_result(outcome.texts[i]) for i, problem in enumerate(asked))
        print(
            f"| {num_open} | {name} | {speed[name]:.0f} | {speed[name] / speed[AR]:.2f} "
            f"| {outcome.whole.tokens / passes:.2f} | {right}/{len(asked)} | {passes:.0f} |",
            flush=True,
        )
        if name != AR and not name.startswith(PLAIN):
            tokens_per_pass = outcome.whole.tokens / passes
            summary.add(f"{name}, {num_open} open", tokens_per_pass, AR, ar_tokens_per_pass, "tokens/pass")
            summary.add(f"{name}, {num_open} open", speed[name], AR, speed[AR], "tokens/s")
    for name, plain in ((AR, PLAIN_AR), (f"threshold {threshold}", f"{PLAIN}, threshold {threshold}")):
        if plain in speed:
            summary.add(f"engine, {name}, {num_open} open", speed[name], plain, speed[plain], "tokens/s")


def engine_variants(llm: LLM, args: argparse.Namespace, counts_passes: bool) -> dict[str, Run]:
    """One engine's ways to answer."""
    from vllm import SamplingParams

    def variant(**options: float | str) -> Run:
        params = SamplingParams(temperature=0, max_tokens=args.max_tokens, extra_args=options)

        def run(prompts: Sequence[str], num_open: int) -> tuple[Outcome, float]:
            before = metric_values(llm)
            outcome = closed_loop(llm, prompts, num_open, params)
            after = metric_values(llm)
            if not counts_passes:
                return outcome, math.nan
            return outcome, sum(after[name] - before[name] for name in (DENOISER, CONTEXT)) - len(prompts)

        return run

    variants = {AR: variant(diffusion_mode="ar")}
    if not args.released:
        variants["verified"] = variant(diffusion_mode="verified")
        variants["auto, lossless"] = variant(diffusion_mode="auto", diffusion_lossless=True)
    if args.released:
        variants["released passes"] = variant(diffusion_strategy=RELEASED)
        return variants | {"auto": variant(diffusion_mode="auto", diffusion_strategy=RELEASED)}
    for threshold in args.thresholds:
        variants[f"threshold {threshold}"] = variant(diffusion_confidence_threshold=threshold)
    return variants | {"auto": variant(diffusion_mode="auto", diffusion_confidence_threshold=middle(args))}


def middle(args: argparse.Namespace) -> float:
    """The threshold of auto and of the plain loop."""
    return args.thresholds[len(args.thresholds) // 2]


def reference_variants(args: argparse.Namespace) -> dict[str, Run]:
    """The plain PyTorch loops, one prompt after the other."""
    import time

    import torch
    from transformers import AutoTokenizer

    from vllm_twotower.reference import TwoTowerModel, generate_ar, generate_mask_diffusion

    model = TwoTowerModel.from_pretrained(args.model, getattr(torch, fastest_dtype()))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    threshold, eos = middle(args), tokenizer.eos_token_id

    def variant(generate: Callable[[list[int]], Any]) -> Run:
        def run(prompts: Sequence[str], num_open: int) -> tuple[Outcome, float]:
            texts, tokens, passes, started = {}, 0, 0, time.perf_counter()
            for index, prompt in enumerate(prompts):
                generation = generate(tokenizer(prompt).input_ids)
                tokens += len(generation.tokens)
                texts[index] = tokenizer.decode(generation.tokens, skip_special_tokens=True)
                passes += generation.nfe or len(generation.tokens)
            stretch = Stretch(tokens, seconds=time.perf_counter() - started)
            return Outcome(stretch, stretch, texts=texts), passes

        return run

    return {
        PLAIN_AR: variant(lambda ids: generate_ar(model, ids, args.max_tokens, eos_token_id=eos)),
        f"{PLAIN}, threshold {threshold}": variant(
            lambda ids: generate_mask_diffusion(model, ids, args.max_tokens, gamma=threshold, eos_token_id=eos)
        ),
    }


if __name__ == "__main__":
    main()
