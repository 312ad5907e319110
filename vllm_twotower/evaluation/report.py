"""The results of an evaluation as Markdown and plots."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from vllm_twotower.experiments.measures import Result
from vllm_twotower.experiments.runs import label

Results = dict[str, Any]


def markdown(results: Results) -> str:
    """All tables."""
    return "\n".join(
        (
            f"# {results['model']}",
            "",
            f"{results['problems']} held-out problems, greedy, at most {results['max_tokens']} tokens, "
            f"{results['dtype']}. Thresholds were compared on {results['problems']} other problems: "
            f"{results['chosen']} is the fastest there that keeps {results['retain']:.1%} of AR's right answers, "
            "or else the best.",
            "",
            *_modes(results),
            "",
            *_families(results),
            *_drafts(results),
            "",
            *_likelihood(results),
            *_sweep("Thresholds (on the problems to choose on)", "threshold", results["thresholds"]),
            *_sweep(f"Passes a block at most, threshold {results['chosen']}", "passes", results["steps"]),
            *_sweep(f"Block width, threshold {results['chosen']}", "width", results["widths"]),
            *_ablations(results),
        )
    )


def _modes(results: Results) -> list[str]:
    ar, speed = results["reported"]["ar"], results["speed"]
    lines = [
        "| mode | right | | of AR | texts as AR's | tokens per pass | tokens/s, one request open | of AR |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, one in results["reported"].items():
        rate = speed.get(name)
        lines.append(
            f"| {name} | {one['right']} of {one['problems']} | {one['accuracy']:.1%} | "
            f"{one['accuracy'] / ar['accuracy'] if ar['accuracy'] else 0:.1%} | "
            f"{'' if one['identical'] is None else one['identical']} | {one['tokens_per_pass']:.2f} | "
            + (f"{rate:.0f} | {rate / speed['ar']:.2f} |" if rate else "| |")
        )
    return lines


def _families(results: Results) -> list[str]:
    names = list(results["reported"])
    lines = [f"| family | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for family in results["reported"][names[0]]["right_by_family"]:
        cells = (results["reported"][name]["right_by_family"][family] for name in names)
        lines.append(f"| {family.replace('_', ' ')} | {' | '.join(f'{right} of {of}' for right, of in cells)} |")
    return lines


def _drafts(results: Results) -> list[str]:
    """Tokens per pass are those of both towers."""
    if not results["drafts"]:
        return []
    lines = [
        "",
        "Verified drafts:",
        "",
        "| draft steps | threshold | accepted tokens a draft | tokens per pass of both towers | texts as AR's |",
        "|---|---|---|---|---|",
    ]
    return lines + [
        f"| {drafted} | {one['accepted_per_draft']:.2f} | {one['tokens_per_pass']:.2f} | {one['identical']} |"
        for drafted, one in results["drafts"].items()
    ]


def _likelihood(results: Results) -> list[str]:
    one = results["likelihood"]
    offsets = " | ".join(f"{value:.3f}" for value in one["by_offset"])
    return [
        f"Answers have {one['context']:.2g} nats a token by the context tower (perplexity {one['perplexity']:.5g}), "
        f"at most {one['denoiser_bound']:.2g} by the denoiser in blocks.",
        "",
        "Cross-entropy of wholly masked blocks by place:",
        "",
        f"| {' | '.join(str(i) for i in range(len(one['by_offset'])))} |",
        "|" + "---|" * len(one["by_offset"]),
        f"| {offsets} |",
    ]


def _sweep(title: str, column: str, scores: Results) -> list[str]:
    if not scores:
        return []
    lines = ["", f"{title}:", "", f"| {column} | right | | tokens per pass |", "|---|---|---|---|"]
    return lines + [
        f"| {value} | {one['right']} of {one['problems']} | {one['accuracy']:.1%} | {one['tokens_per_pass']:.2f} |"
        for value, one in scores.items()
    ]


def _ablations(results: Results) -> list[str]:
    lines = ["", f"What the denoiser is given, threshold {results['chosen']}:", ""]
    lines += ["| the denoiser | right | |", "|---|---|---|"]
    return lines + [
        f"| {name} | {one['right']} of {one['problems']} | {one['accuracy']:.1%} |"
        for name, one in results["ablations"].items()
    ]


def draw(results: Results, folder: Path) -> None:
    """The plots of the experiments: quality by threshold on the problems to choose on, the others on those reported."""
    from vllm_twotower.experiments.figures import PLOTS, Row, draw_all

    chosen = results["chosen"]

    def row(sweep: str, name: str, entry: Results, **flags: bool) -> Row:
        known = {field.name for field in fields(Result)}
        one = Result.from_json({key: value for key, value in entry.items() if key in known})
        return Row(f"{sweep}/{name}", sweep, name, one, **flags)

    ar = row("modes", "autoregressive", results["chosen_on"]["ar"], is_ar=True)
    thresholds = [row("threshold", f"threshold {name}", entry) for name, entry in results["thresholds"].items()]
    draw_all([ar, *thresholds], folder, ["quality.png"])
    modes = {name: entry for name, entry in results["reported"].items() if name != "verified" or not results["drafts"]}
    reported = [row("modes", name, entry, is_ar=name == "ar") for name, entry in modes.items()]
    drafts = {name: entry for name, entry in results["drafts"].items() if name.endswith(("any", f" {chosen:g}"))}
    reported += [row("drafts", label({"draft_steps": int(name.split()[0])}), one) for name, one in drafts.items()]
    reported += [row("steps", label({"max_steps": int(name)}), entry) for name, entry in results["steps"].items()]
    reported += [row("width", f"width {name}", entry) for name, entry in results["widths"].items()]
    reported += [
        row("ablation", name, entry, is_ablated=name != "as trained") for name, entry in results["ablations"].items()
    ]
    draw_all(reported, folder, [name for name in PLOTS if name != "quality.png"])
