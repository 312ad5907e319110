"""``vllm-twotower demo``: a few prompts through vLLM's engine by mask diffusion, verified drafts and autoregression."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from vllm_twotower.arguments import probability, whole_number
from vllm_twotower.models import embedded_model
from vllm_twotower.offline import Answers, generate, logged_to, small_engine

if TYPE_CHECKING:
    from vllm import LLM

MODES = {
    "ar": "token by token",
    "verified": "drafts that the context tower verifies",
    "mask_diffusion": "blocks, unmasked pass by pass",
}
ROUNDS = 5
BAR = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("prompts", nargs="*", help="prompts; by default held-out problems of the tiny model")
    parser.add_argument("--model", type=Path, default=embedded_model(), help="checkpoint folder (default: %(default)s)")
    parser.add_argument("--max-tokens", type=whole_number, default=96, help="per prompt (default: %(default)s)")
    parser.add_argument(
        "--confidence-threshold",
        type=probability,
        default=0.8,
        help="tokens at least this probable are committed at once (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    """Runs the command: answers with tokens per pass, all prompts in one batch, and a race of the modes."""
    prompts = args.prompts or heldout_prompts(args.model)
    log = Path(tempfile.gettempdir()) / "vllm-twotower-demo.log"
    print(f"The engine starts; its log is in {log}.", flush=True)
    with logged_to(log) as out, small_engine(args.model, max_num_seqs=16, kv_cache_memory_bytes=128 << 20) as llm:
        modes = {mode: {"diffusion_mode": mode} for mode in MODES}
        modes["mask_diffusion"]["diffusion_confidence_threshold"] = args.confidence_threshold
        for options in modes.values():
            generate(llm, prompts[:1], args.max_tokens, options)  # the first request pays for lazy initialisation
        longest = _show_answers(llm, prompts, modes["mask_diffusion"], args.max_tokens, out)
        _show_batch(llm, prompts, modes, args.max_tokens, out)
        _show_race(llm, longest, modes, args.max_tokens, out)


def _show_answers(llm: LLM, prompts: list[str], options: dict, max_tokens: int, out: TextIO) -> str:
    """Prints every answer; returns the prompt that has the longest."""
    bold, plain = ("\033[1m", "\033[0m") if out.isatty() else ("", "")
    longest, most = prompts[0], 0
    for prompt in prompts:
        answer = generate(llm, [prompt], max_tokens, options)
        each = answer.tokens / answer.passes
        print(f"\n{prompt}{bold}{answer.texts[0]}{plain}", file=out)
        print(f"    [{answer.tokens} tokens in {answer.passes} denoiser passes: {each:.1f} each]", file=out)
        if answer.tokens > most:
            longest, most = prompt, answer.tokens
    return longest


def _show_batch(llm: LLM, prompts: list[str], modes: dict[str, dict], max_tokens: int, out: TextIO) -> None:
    print(f"\nAll {len(prompts)} prompts in one batch:", file=out)
    print(f"{'':16}{'tokens':>8}{'passes':>8}{'tokens/pass':>13}{'tokens/s':>10}", file=out)
    texts = {}
    for mode, options in modes.items():
        total = generate(llm, prompts, max_tokens, options)
        texts[mode] = total.texts
        per_pass, per_second = total.tokens / total.passes, total.tokens / total.seconds
        print(f"{mode:16}{total.tokens:8}{total.passes:8}{per_pass:13.2f}{per_second:10.0f}", file=out)
    same = sum(map(str.__eq__, texts["verified"], texts["ar"]))
    print(f"Verified, {same} of {len(prompts)} texts are exactly those of ar.", file=out)


def _show_race(llm: LLM, prompt: str, modes: dict[str, dict], max_tokens: int, out: TextIO) -> None:
    """Prints how long each mode takes for one prompt, alone in the engine; the fastest of some rounds in turns."""
    rounds = [
        {mode: generate(llm, [prompt], max_tokens, options) for mode, options in modes.items()} for _ in range(ROUNDS)
    ]
    seconds = {mode: min(answers[mode].seconds for answers in rounds) for mode in modes}
    answers: dict[str, Answers] = rounds[0]
    print(f"\nThe race: one question by every mode, alone in the engine.\n\n{prompt}", file=out)
    slowest, block = max(seconds.values()), "\u2588" if out.encoding.lower().startswith("utf") else "#"
    for mode, what in MODES.items():
        bar = block * max(1, round(BAR * seconds[mode] / slowest))
        counts = f"{answers[mode].tokens} tokens in {answers[mode].passes} passes"
        print(f"  {mode:15}{bar:{BAR}} {seconds[mode]:6.3f} s  {counts}: {what}", file=out)
    same = "the same" if answers["verified"].texts == answers["ar"].texts else "not the same"
    faster = {mode: f"{seconds['ar'] / seconds[mode]:.1f} times" for mode in modes}
    print(
        f"\nThis run has shown: mask diffusion answers {faster['mask_diffusion']} as fast as ar, and verified "
        f"{faster['verified']}, with {same} text as ar.",
        file=out,
    )


def heldout_prompts(model: Path, count: int = 6) -> list[str]:
    """Held-out problems that lie beside the tiny model."""
    lines = (model / "heldout.jsonl").read_text().splitlines()
    return [json.loads(line)["prompt"] for line in lines[:: max(1, len(lines) // count)]][:count]
