"""Tokens per second and per tower pass: mask diffusion against autoregression in one engine, and the plain model.

All figures come from one run, the variants take turns, and each is the median of its rounds:

    OMP_NUM_THREADS=1 python benchmarks/throughput.py --batch-sizes 1 4 16 --thresholds 0.6 0.8 0.95
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from vllm_twotower.demo import Answers, generate

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def main() -> None:
    """Measures and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/tiny-twotower"))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.6, 0.8, 0.95])
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    prompts = [json.loads(line)["prompt"] for line in (args.model / "heldout.jsonl").read_text().splitlines()]
    engine = engine_variants(args)
    reference = reference_variant(args)
    print(f"{'requests':>8} {'variant':26} {'tokens/pass':>11} {'tokens/s':>9} {'against AR':>11}")
    for batch_size in args.batch_sizes:
        batch = prompts[:batch_size]
        variants = {**engine, **(reference if batch_size == args.batch_sizes[0] else {})}
        for run in variants.values():
            run(batch)  # warm up
        rounds: dict[str, list[Answers]] = {name: [] for name in variants}
        for _ in range(args.rounds):
            for name, run in variants.items():
                rounds[name].append(run(batch))
        speed = {name: statistics.median(r.tokens / r.seconds for r in runs) for name, runs in rounds.items()}
        for name, runs in rounds.items():
            per_pass, ratio = runs[0].tokens / runs[0].passes, speed[name] / speed["engine, AR"]
            print(f"{batch_size:8} {name:26} {per_pass:11.2f} {speed[name]:9.0f} {ratio:11.2f}")


def engine_variants(args: argparse.Namespace) -> dict[str, Callable[[list[str]], Answers]]:
    """The engine's ways to answer prompts, each a function of them."""
    from vllm import LLM

    llm = LLM(
        model=str(args.model),
        max_model_len=1024,
        max_num_seqs=max(args.batch_sizes),
        kv_cache_memory_bytes=256 << 20,
        disable_log_stats=False,
    )

    def variant(**options: float | str) -> Callable[[list[str]], Answers]:
        return lambda prompts: generate(llm, prompts, args.max_tokens, options, ignore_eos=True)

    variants = {"engine, AR": variant(diffusion_mode="ar")}
    for threshold in args.thresholds:
        variants[f"engine, threshold {threshold}"] = variant(diffusion_confidence_threshold=threshold)
    return variants


def reference_variant(args: argparse.Namespace) -> dict[str, Callable[[list[str]], Answers]]:
    """The plain PyTorch loop, one prompt after the other."""
    import torch
    from transformers import AutoTokenizer

    from vllm_twotower.reference import TwoTowerModel, generate_mask_diffusion

    model = TwoTowerModel.from_pretrained(args.model, torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    threshold = args.thresholds[0]

    def run(prompts: list[str]) -> Answers:
        start = time.perf_counter()
        results = [
            generate_mask_diffusion(model, tokenizer(prompt).input_ids, args.max_tokens, gamma=threshold)
            for prompt in prompts
        ]
        seconds = time.perf_counter() - start
        return Answers([], sum(len(r.tokens) for r in results), sum(r.nfe for r in results), seconds)

    return {f"reference, threshold {threshold}": run}


if __name__ == "__main__":
    main()
