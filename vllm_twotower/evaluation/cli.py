"""Evaluates a checkpoint on held-out problems: accuracy and speed of AR, verified drafts and mask diffusion, sweeps,
likelihoods.

Writes results.json, results.md and plots. The threshold is chosen on other problems than those that are reported: the
one with the most tokens per pass that keeps 99 % (or --retain) of AR's right answers, or else the one with the most
right answers. (The paper's model keeps 98.7 %.)
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_twotower.evaluation.answers import held_out_problems, speeds
from vllm_twotower.evaluation.report import draw, markdown
from vllm_twotower.experiments.cli import allow_ablations, goes_on, identical_texts
from vllm_twotower.experiments.measures import Result
from vllm_twotower.experiments.runs import Engines, Run, Workload, run_all
from vllm_twotower.experiments.store import Store, key_of
from vllm_twotower.experiments.tasks import Task
from vllm_twotower.offline import fastest_dtype, use_one_thread
from vllm_twotower.training.problems import Problem

AR = {"mode": "ar"}
VERIFIED = {"mode": "verified"}
ABLATIONS: dict[str, dict[str, Any]] = {
    "as trained": {},
    "t always 0.5": {"time": 0.5},
    "no Mamba states of the context": {"mamba_seed": False},
    "no keys and values of the context": {"context_kv": False},
}


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
    parser.add_argument("--dtype", help="default: bfloat16 where the machine has instructions for it, else float32")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    use_one_thread()
    args.dtype = args.dtype or fastest_dtype()
    to_choose, to_report = held_out_problems(args.problems, args.seed)
    results: dict[str, Any] = {
        "model": args.model.name,
        "dtype": args.dtype,
        "problems": args.problems,
        "max_tokens": args.max_tokens,
        "retain": args.retain,
    }
    store = Store(args.output)
    with goes_on(args.output):
        results |= _generated(args, store, to_choose, to_report)
        results["likelihood"] = _likelihoods(args, store, to_report[: args.likelihood_problems])
    (args.output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    text = markdown(results)
    (args.output / "results.md").write_text(text + "\n", encoding="utf-8")
    draw(results, args.output)
    print(text)


def choose_threshold(ar: Result, scores: Mapping[float, Result], retain: float) -> float:
    """The fastest threshold that keeps a share of AR's accuracy; if none does, the one with the most right answers."""
    keeping = [threshold for threshold, one in scores.items() if one.accuracy >= retain * ar.accuracy]
    if keeping:
        return max(keeping, key=lambda threshold: scores[threshold].tokens_per_pass)
    return max(scores, key=lambda threshold: (scores[threshold].right, scores[threshold].tokens_per_pass))


def _generated(
    args: argparse.Namespace, store: Store, to_choose: list[Problem], to_report: list[Problem]
) -> dict[str, Any]:
    """What comes from engines."""
    engine = {"dtype": args.dtype, "max_num_seqs": args.max_num_seqs, "kv_cache_memory_bytes": 512 << 20}
    choosing, reporting, ablating = (
        Workload(str(args.model), [Task.of(problem) for problem in problems], args.max_tokens)
        for problems in (to_choose, to_report, to_report[: args.likelihood_problems])
    )
    with closing(Engines(str(args.model))) as engines:

        def results_of(*groups: list[Run]) -> list[dict[str, Result]]:
            runs = [run for group in groups for run in group]
            allow_ablations(runs)
            found = run_all(runs, store, engines)
            return [{run.label: found[run.key] for run in group} for group in groups]

        thresholds = {f"{t:g}": _threshold(t) for t in args.thresholds}
        [on_others] = results_of(_runs(choosing, "thresholds", {"ar": AR, **thresholds}, engine))
        ar = on_others.pop("ar")
        chosen = choose_threshold(ar, {float(name): one for name, one in on_others.items()}, args.retain)
        variants = {"ar": AR, "verified": VERIFIED, f"threshold {chosen:g}": _threshold(chosen)}
        widths = {str(n): {"canvas_length": n, "max_steps": n, **_threshold(chosen)} for n in args.widths}
        wide = {**engine, "diffusion_config": {"canvas_length": max(args.widths, default=1)}}
        groups = {
            "reported": _runs(reporting, "modes", {**variants, "threshold 1": _threshold(1.0)}, engine),
            "drafts": _runs(reporting, "drafts", _drafts(args.draft_steps, args.thresholds), engine),
            "steps": _runs(
                reporting, "steps", {str(n): {"max_steps": n, **_threshold(chosen)} for n in args.steps}, engine
            ),
            "widths": _runs(reporting, "widths", widths, wide),
            "ablations": _runs(
                ablating,
                "ablations",
                {name: {"ablation": ablation, **_threshold(chosen)} for name, ablation in ABLATIONS.items()},
                engine,
            ),
        }
        first = [name for name in groups if name not in ("widths", "ablations")]
        found = dict(zip(first, results_of(*(groups[name] for name in first)), strict=True))
        speed = _speed(args, store, engines, reporting, engine, to_report[: args.speed_problems], variants)
        found |= dict(zip(("widths", "ablations"), results_of(groups["widths"], groups["ablations"]), strict=True))
    identical = identical_texts(groups["reported"] + groups["drafts"], store)
    return {
        "chosen": chosen,
        "chosen_on": {"ar": _entry(ar)},
        "thresholds": {name: _entry(one) for name, one in on_others.items()},
        "speed": speed,
        **{
            group: {run.label: _entry(found[group][run.label], identical.get(run.key)) for run in runs}
            for group, runs in groups.items()
        },
    }


def _runs(workload: Workload, sweep: str, chosen: Mapping[str, Mapping[str, Any]], engine: dict[str, Any]) -> list[Run]:
    """One for each entry, which names it."""
    return [Run(workload, sweep, name, of_run, engine) for name, of_run in chosen.items()]


def _threshold(value: float) -> dict[str, Any]:
    return {"confidence_threshold": value}


def _drafts(draft_steps: list[int], thresholds: list[float]) -> dict[str, dict[str, Any]]:
    """With a single pass all tokens are taken, whatever the threshold is."""
    return {
        f"{n} | {'any' if n == 1 else f'{t:g}'}": {**VERIFIED, **_threshold(t), "draft_steps": n}
        for n in draft_steps
        for t in (thresholds[:1] if n == 1 else thresholds)
    }


def _speed(
    args: argparse.Namespace,
    store: Store,
    engines: Engines,
    workload: Workload,
    engine: dict[str, Any],
    problems: list[Problem],
    variants: Mapping[str, Mapping[str, Any]],
) -> dict[str, float]:
    """Tokens/s with one request open, measured once."""
    key = key_of(["speed", workload.key, engine, len(problems), variants, args.rounds])
    if (found := store.get(key)) is None:
        options = {name: {f"diffusion_{of}": value for of, value in one.items()} for name, one in variants.items()}
        found = {"speed": speeds(engines.get(engine), problems, args.max_tokens, options, args.rounds)}
        store.put(key, found)
    return found["speed"]


def _entry(one: Result, identical: int | None = None) -> dict[str, Any]:
    derived = {
        "accuracy": one.accuracy,
        "tokens_per_pass": one.tokens_per_pass,
        "accepted_per_draft": one.accepted_per_draft,
    }
    return {**asdict(one), **derived, "identical": identical}


def _likelihoods(args: argparse.Namespace, store: Store, problems: list[Problem]) -> dict[str, Any]:
    """What comes from the plain model, measured once."""
    key = key_of(["likelihood", Workload(str(args.model), [Task.of(problem) for problem in problems]).key, args.seed])
    if (found := store.get(key)) is None:
        import torch
        from transformers import AutoTokenizer

        from vllm_twotower.evaluation.likelihood import likelihood
        from vllm_twotower.reference import TwoTowerModel

        model = TwoTowerModel.from_pretrained(args.model, torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(args.model)

        def encode(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False)

        one = likelihood(model, problems, encode, tokenizer.bos_token_id, strata=8, seed=args.seed)
        found = {"likelihood": {**asdict(one), "perplexity": one.perplexity}}
        store.put(key, found)
    return found["likelihood"]
