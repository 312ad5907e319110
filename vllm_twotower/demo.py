"""``vllm-twotower demo``: a few prompts through vLLM's engine by mask diffusion, verified drafts and autoregression."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_twotower.models import embedded_model
from vllm_twotower.offline import generate, small_engine

if TYPE_CHECKING:
    from vllm import LLM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("prompts", nargs="*", help="prompts; by default held-out problems of the tiny model")
    parser.add_argument("--model", type=Path, default=embedded_model(), help="checkpoint folder (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=96, help="per prompt (default: %(default)s)")
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        default=0.8,
        help="tokens at least this probable are committed at once (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    """Runs the command: prints prompt, text, tokens per denoiser pass and tokens/s."""
    prompts = args.prompts or heldout_prompts(args.model)
    with small_engine(args.model, max_num_seqs=16, kv_cache_memory_bytes=128 << 20) as llm:
        _show(llm, prompts, args)


def _show(llm: LLM, prompts: list[str], args: argparse.Namespace) -> None:
    diffusion = {"diffusion_confidence_threshold": args.confidence_threshold}
    modes = {
        "mask diffusion": diffusion,
        "verified": diffusion | {"diffusion_mode": "verified"},
        "autoregressive": {"diffusion_mode": "ar"},
    }
    for options in modes.values():
        generate(llm, prompts[:1], args.max_tokens, options)  # the first request pays for lazy initialisation

    for prompt in prompts:
        answer = generate(llm, [prompt], args.max_tokens, diffusion)
        print(f"\n{prompt}\033[1m{answer.texts[0]}\033[0m")
        print(
            f"    [{answer.tokens} tokens in {answer.passes} denoiser passes: {answer.tokens / answer.passes:.1f} each]"
        )
    print(f"\nAll {len(prompts)} prompts in one batch:")
    print(f"{'':16}{'tokens':>8}{'passes':>8}{'tokens/pass':>13}{'tokens/s':>10}")
    texts = {}
    for title, options in modes.items():
        total = generate(llm, prompts, args.max_tokens, options)
        texts[title] = total.texts
        per_pass, per_second = total.tokens / total.passes, total.tokens / total.seconds
        print(f"{title:16}{total.tokens:8}{total.passes:8}{per_pass:13.2f}{per_second:10.0f}")
    same = sum(map(str.__eq__, texts["verified"], texts["autoregressive"]))
    print(f"\nVerified, {same} of {len(prompts)} texts are exactly the autoregressive ones.")


def heldout_prompts(model: Path, count: int = 6) -> list[str]:
    """Held-out problems that lie beside the tiny model."""
    lines = (model / "heldout.jsonl").read_text().splitlines()
    return [json.loads(line)["prompt"] for line in lines[:: max(1, len(lines) // count)]][:count]
