"""Evaluates a checkpoint on held-out problems: accuracy and speed of AR, verified drafts and mask diffusion, sweeps,
likelihoods.

Writes results.json, results.md and plots. The threshold is chosen on other problems than those that are reported: the
one with the most tokens per pass that keeps 99 % (or --retain) of AR's right answers, or else the one with the most
right answers. (The paper's model keeps 98.7 %.)
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_twotower.evaluation.answers import AR, VERIFIED, Score, held_out_problems, score, speeds
from vllm_twotower.evaluation.report import draw, markdown
from vllm_twotower.offline import fastest_dtype, small_engine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("model", type=Path, help="checkpoint folder")
    parser.add_argument("--output", type=Path, default=Path("runs/evaluation"), help="folder (default: %(default)s)")
    parser.add_argument("--problems", type=int, default=2000, help="to choose on, and as many to report")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0])
    parser.add_argument("--retain", type=float, default=0.99, help="share of AR's right answers that is to be kept")
    parser.add_argument("--steps", type=int, nargs="*", default=[1, 2, 4, 8], help="passes a block at most")
    parser.add_argument("--draft-steps", type=int, nargs="*", default=[1, 2, 4], help="passes that draft a block")
    parser.add_argument("--widths", type=int, nargs="*", default=[4, 8, 16, 32, 64], help="block widths")
    parser.add_argument("--speed-problems", type=int, default=32, help="answered one after the other")
    parser.add_argument("--rounds", type=int, default=3, help="of the speed measurement")
    parser.add_argument("--likelihood-problems", type=int, default=200, help="for likelihoods and ablations")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--dtype", default=fastest_dtype(), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    to_choose, to_report = held_out_problems(args.problems, args.seed)
    results: dict[str, Any] = {
        "model": args.model.name,
        "dtype": args.dtype,
        "problems": args.problems,
        "max_tokens": args.max_tokens,
        "retain": args.retain,
    }
    results |= _generated(args, to_choose, to_report)
    results |= _likelihoods(args, to_report, results["chosen"])
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    text = markdown(results)
    (args.output / "results.md").write_text(text + "\n", encoding="utf-8")
    draw(results, args.output)
    print(text)


def choose_threshold(ar: Score, scores: dict[float, Score], retain: float) -> float:
    """The fastest threshold that keeps a share of AR's accuracy; if none does, the one with the most right answers."""
    keeping = [threshold for threshold, one in scores.items() if one.accuracy >= retain * ar.accuracy]
    if keeping:
        return max(keeping, key=lambda threshold: scores[threshold].tokens_per_pass)
    return max(scores, key=lambda threshold: (scores[threshold].right, scores[threshold].tokens_per_pass))


def _generated(args: argparse.Namespace, to_choose: list, to_report: list) -> dict[str, Any]:
    """What comes from the engine."""
    engine = {"dtype": args.dtype, "max_num_seqs": args.max_num_seqs, "kv_cache_memory_bytes": 512 << 20}
    with small_engine(args.model, **engine) as llm:
        ar = score(llm, to_choose, args.max_tokens, AR)
        thresholds = {t: score(llm, to_choose, args.max_tokens, _threshold(t)) for t in args.thresholds}
        chosen = choose_threshold(ar, thresholds, args.retain)
        name = f"threshold {chosen:g}"
        variants = {"ar": AR, "verified": VERIFIED, name: _threshold(chosen), "threshold 1": _threshold(1.0)}
        of_ar: list[str] = []
        reported = {
            variant: score(llm, to_report, args.max_tokens, options, of_ar) for variant, options in variants.items()
        }
        drafts = {
            # With a single pass all tokens are taken, whatever the threshold is.
            f"{n} | {'any' if n == 1 else f'{t:g}'}": score(
                llm, to_report, args.max_tokens, VERIFIED | _threshold(t) | {"diffusion_draft_steps": n}, of_ar
            )
            for n in args.draft_steps
            for t in (args.thresholds[:1] if n == 1 else args.thresholds)
        }
        steps = {
            n: score(llm, to_report, args.max_tokens, _threshold(chosen) | {"diffusion_max_steps": n})
            for n in args.steps
        }
        asked = to_report[: args.speed_problems]
        del variants["threshold 1"]
        speed = speeds(llm, asked, args.max_tokens, variants, args.rounds)
    widths = {}
    if args.widths:
        with small_engine(args.model, diffusion_config={"canvas_length": max(args.widths)}, **engine) as llm:
            for width in args.widths:
                options = _threshold(chosen) | {"diffusion_canvas_length": width, "diffusion_max_steps": width}
                widths[width] = score(llm, to_report, args.max_tokens, options)
    return {
        "chosen": chosen,
        "chosen_on": {"ar": _entry(ar)},
        "thresholds": {f"{t:g}": _entry(one) for t, one in thresholds.items()},
        "reported": {variant: _entry(one) for variant, one in reported.items()},
        "drafts": {drafted: _entry(one) for drafted, one in drafts.items()},
        "steps": {str(n): _entry(one) for n, one in steps.items()},
        "widths": {str(width): _entry(one) for width, one in widths.items()},
        "speed": speed,
    }


def _threshold(value: float) -> dict[str, Any]:
    return {"diffusion_confidence_threshold": value}


def _entry(one: Score) -> dict[str, Any]:
    return {**asdict(one), "accuracy": one.accuracy, "tokens_per_pass": one.tokens_per_pass}


def _likelihoods(args: argparse.Namespace, problems: list, chosen: float) -> dict[str, Any]:
    """What comes from the plain model."""
    import torch
    from transformers import AutoTokenizer

    from vllm_twotower.evaluation.ablations import ABLATIONS, ablated
    from vllm_twotower.evaluation.likelihood import answers, likelihood, unmasking_order
    from vllm_twotower.reference import Generation, TwoTowerModel
    from vllm_twotower.training.problems import is_right

    model = TwoTowerModel.from_pretrained(args.model, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    some = problems[: args.likelihood_problems]

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    def answered(by: TwoTowerModel) -> list[Generation]:
        return answers(by, some, encode, tokenizer.bos_token_id, chosen, args.max_tokens)

    def right(given: list[Generation]) -> int:
        texts = (tokenizer.decode(one.tokens, skip_special_tokens=True) for one in given)
        return sum(map(is_right, texts, some))

    found = likelihood(model, some, encode, tokenizer.bos_token_id, strata=8, seed=args.seed)
    as_trained = answered(model)
    rights = {"as trained": right(as_trained)}
    rights |= {name: right(answered(ablated(model, change))) for name, change in ABLATIONS.items()}
    return {
        "likelihood": {**asdict(found), "perplexity": found.perplexity},
        "unmasking": unmasking_order(as_trained, model.config.canvas_length, model.config.mask_token_id),
        "ablations": {"problems": len(some), "right": rights},
    }
