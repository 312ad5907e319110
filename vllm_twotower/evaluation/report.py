"""The results of an evaluation as Markdown and plots."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
        f"| {drafted} | {one['accepted']:.2f} | {one['tokens_per_pass']:.2f} | {one['identical']} |"
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
    problems, right = results["ablations"]["problems"], results["ablations"]["right"]
    lines = ["", f"What the denoiser is given, threshold {results['chosen']}, the plain model in fp32:", ""]
    lines += ["| the denoiser | right | |", "|---|---|---|"]
    return lines + [f"| {name} | {n} of {problems} | {n / problems:.1%} |" for name, n in right.items()]


def draw(results: Results, folder: Path) -> None:
    """quality.png, steps_per_block.png, unmasking.png and accepted.png."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    scores = results["thresholds"]
    axes.plot([s["tokens_per_pass"] for s in scores.values()], [s["accuracy"] for s in scores.values()], "o-")
    for value, one in scores.items():
        axes.annotate(value, (one["tokens_per_pass"], one["accuracy"]), textcoords="offset points", xytext=(4, 4))
    axes.axhline(results["chosen_on"]["ar"]["accuracy"], linestyle="--", color="gray", label="AR")
    axes.set(xlabel="tokens per denoiser pass", ylabel="right answers", title="quality against speed, by threshold")
    axes.margins(x=0.12)
    axes.legend()
    figure.savefig(folder / "quality.png", dpi=110)

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes, blocks = figure.subplots(), results["reported"][f"threshold {results['chosen']:g}"]["steps_per_block"]
    axes.bar(list(blocks), list(blocks.values()))
    axes.set(
        xlabel="denoiser passes, at most", ylabel="blocks", title=f"steps per block, threshold {results['chosen']}"
    )
    figure.savefig(folder / "steps_per_block.png", dpi=110)

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    shares = results["unmasking"]
    passes = range(1, len(shares) + 1)
    edges = (-0.5, len(shares[0]) - 0.5, 0.5, len(shares) + 0.5)
    image = axes.imshow(shares, aspect="auto", origin="lower", extent=edges, norm=LogNorm(1e-3, 1, clip=True))
    axes.set(xlabel="place in the block", ylabel="pass", yticks=list(passes))
    axes.set_title("share of blocks that commit a place in a pass")
    figure.colorbar(image)
    figure.savefig(folder / "unmasking.png", dpi=110)

    if results["drafts"]:
        _draw_drafts(results["drafts"]).savefig(folder / "accepted.png", dpi=110)


def _draw_drafts(drafts: Results) -> Figure:
    """Accepted tokens a draft, and tokens per pass of both towers, by draft steps and threshold."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.4), layout="constrained")
    steps = list(dict.fromkeys(drafted.split(" | ")[0] for drafted in drafts))
    for axes, key, title in (
        (figure.add_subplot(1, 2, 1), "accepted", "accepted tokens a draft"),
        (figure.add_subplot(1, 2, 2), "tokens_per_pass", "tokens per pass of both towers"),
    ):
        for n in steps:
            of_steps = {name.split(" | ")[1]: one[key] for name, one in drafts.items() if name.startswith(f"{n} |")}
            if "any" in of_steps:
                axes.axhline(of_steps["any"], linestyle="--", color="gray", label=f"{n} step")
            else:
                axes.plot(list(of_steps), list(of_steps.values()), "o-", label=f"{n} steps")
        axes.set(xlabel="threshold", title=title)
        axes.set_ylim(bottom=0)
        axes.legend(loc="lower right")
    return figure
