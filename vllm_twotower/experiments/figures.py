"""The plots of an experiment: each title says what was found, in the numbers that were measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from .labels import merged_label, place_labels, without_common_start
from .measures import Result

# Okabe and Ito's colours, which colour-blind readers tell apart, without yellow, which is faint on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
KEPT = 0.99
"""The share of AR's right answers that a setting is to keep."""
_PASSES = {
    "1": (1, 1), "2": (2, 2), "3 to 4": (3, 4), "5 to 8": (5, 8), "9 to 16": (9, 16), "17 and more": (17, 1 << 31),
}  # fmt: skip
_MOST_TAUS, _MOST_LINES = 9, 6
_GRAY = "#555555"


@dataclass(frozen=True)
class Row:
    """A run as plots show it."""

    key: str
    sweep: str
    label: str
    result: Result
    is_ar: bool = False
    is_ablated: bool = False


def draw_all(rows: Sequence[Row], folder: Path, names: Sequence[str] = ()) -> list[str]:
    """Draws the plots ``names``, by default all, that the rows have data for; the files' names."""
    written = []
    for name in names or PLOTS:
        if (figure := PLOTS[name](rows)) is not None:
            figure.savefig(folder / name)
            written.append(name)
    return written


def _figure(width: float, height: float, title: str, rows: int = 1, columns: int = 1, **options) -> tuple[Figure, Any]:
    """A figure, its title over all of it, and its axes."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=200)
    figure.suptitle(fill(title, int(11 * width)), x=0.01, ha="left", fontsize=11.5, fontweight="bold")
    axes = figure.subplots(rows, columns, **options)
    for one in np.ravel(axes):
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(labelsize=9)
    return figure, axes


def _percent(part: float, digits: int = 1) -> str:
    return f"{100 * part:.{digits}f} %"


def quality(rows: Sequence[Row]) -> Figure | None:
    """Right answers against tokens per pass, a panel for each sweep, where the others' points are gray."""
    blocks = [row for row in _whole(rows) if row.result.blocks]
    ar = next((row.result for row in rows if row.is_ar), None)
    if not blocks:
        return None
    best = max(row.result.accuracy for row in blocks)
    shown = [row for row in blocks if row.result.accuracy >= 0.9 * best]
    sweeps = list(dict.fromkeys(row.sweep for row in shown))
    columns = min(3, len(sweeps))
    lines = -(-len(sweeps) // columns)
    size = (7.6, 4.6) if columns == 1 else (3.5 * columns, 1.3 + 2.5 * lines)
    figure, panels = _figure(*size, _quality_title(blocks, ar), lines, columns, sharex=True, sharey=True, squeeze=False)
    everything = [_point(row) for row in shown]
    shares = [y for _, y in everything] + ([ar.accuracy] if ar else [])
    _set_percent(panels[0, 0], min(shares), max(shares))
    most = 1.2 * max(x for x, _ in everything)
    panels[0, 0].set_xlim(0, most)
    panels[0, 0].set_xticks([mark for mark in panels[0, 0].get_xticks() if 0 <= mark <= most])
    for panel in panels.flat[len(sweeps) :]:
        panel.set_visible(False)
    for number, (panel, sweep) in enumerate(zip(panels.flat, sweeps, strict=False)):
        color = COLORS[number % len(COLORS)]
        points = [_point(row) for row in shown if row.sweep == sweep]
        if ar is not None:
            panel.axhline(ar.accuracy, linestyle="--", color=_GRAY, linewidth=1)
        panel.scatter(*zip(*everything, strict=True), color="#d5d5d5", s=14)
        is_scale = all(any(map(str.isdigit, row.label)) for row in shown if row.sweep == sweep)
        style = "-" if is_scale else "none"
        panel.plot(*zip(*points, strict=True), marker="o", color=color, linestyle=style, linewidth=1.2, markersize=5)
        panel.grid(alpha=0.25)
        panel.set_title(sweep, fontsize=10, color=color, loc="left")
    if ar is not None:
        panels[0, 0].annotate(
            f"autoregressive: {_percent(ar.accuracy)}", (1, ar.accuracy), (0, 3),
            xycoords=("axes fraction", "data"), textcoords="offset points", color=_GRAY, fontsize=8.5, ha="right",
        )  # fmt: skip
    words = ", ".join(f"{row.label} with {_percent(row.result.accuracy, 0)}" for row in blocks if row not in shown)
    note = f"tokens per pass{words and f' (below the plot: {words})'}"
    figure.supxlabel(fill(note, int(13 * size[0])), fontsize=10)
    figure.supylabel("right answers", fontsize=10)
    for number, (panel, sweep) in enumerate(zip(panels.flat, sweeps, strict=False)):
        of_sweep = [row for row in shown if row.sweep == sweep]
        labels = without_common_start([row.label for row in of_sweep])
        place_labels(figure, panel, [_point(row) for row in of_sweep], labels, COLORS[number % len(COLORS)])
    return figure


def _quality_title(blocks: Sequence[Row], ar: Result | None) -> str:
    top = _fastest(blocks, ar)
    speed = f"at {top.result.tokens_per_pass:.1f} tokens a pass ({top.label})"
    if ar is None or not ar.right:
        return f"{_percent(top.result.accuracy)} of the answers are right {speed}"
    return f"{_percent(top.result.accuracy / ar.accuracy)} of AR's right answers {speed}"


def _fastest(rows: Sequence[Row], ar: Result | None) -> Row:
    """The run with most tokens a pass that keeps AR's quality, or the best one's, or the best run."""
    best = max(rows, key=lambda row: row.result.accuracy)
    least = KEPT * (best.result.accuracy if ar is None else ar.accuracy)
    keeping = [row for row in rows if row.result.accuracy >= least]
    return max(keeping or [best], key=lambda row: row.result.tokens_per_pass)


def _point(row: Row) -> tuple[float, float]:
    return row.result.tokens_per_pass, row.result.accuracy


def _grouped(rows: Sequence[Row], shown: Callable[[Result], Any]) -> dict[str, Result]:
    """Results by label; those of a sweep that show the same are one."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in _distinct(rows):
        groups.setdefault((row.sweep, repr(shown(row.result))), []).append(row)
    return {merged_label([row.label for row in group]): group[0].result for group in groups.values()}


def passes_per_block(rows: Sequence[Row]) -> Figure | None:
    """How many denoiser passes blocks take, a bar for all runs of a sweep that are alike in this."""
    filled = [row for row in _whole(rows) if row.result.blocks and not row.result.drafts]
    if not filled:
        return None
    top = _fastest(filled, next((row.result for row in rows if row.is_ar), None))
    title = (
        f"{_capital(top.label)}: {_percent(top.result.passes_per_block.get(1, 0) / top.result.blocks, 0)} of blocks "
        f"take one pass, the mean is {top.result.mean_passes_per_block:.2f}"
    )
    shown = _grouped(filled, _bars)
    figure, axes = _figure(8.4, 1.7 + 0.33 * len(shown), title)
    colors = colormaps["viridis"]
    for place, result in enumerate(shown.values()):
        left = 0.0
        for number, (name, share) in enumerate(zip(_PASSES, _shares(result), strict=True)):
            color = colors(0.92 - 0.86 * number / (len(_PASSES) - 1))
            axes.barh(place, share, left=left, color=color, height=0.72, label=None if place else name)
            if share >= 0.08:
                axes.text(
                    left + share / 2, place, _percent(share, 0), ha="center", va="center", fontsize=8,
                    color="white" if number >= 3 else "black",
                )  # fmt: skip
            left += share
        axes.text(1.01, place, f"{result.mean_passes_per_block:.2f}", va="center", fontsize=9)
    axes.text(1.01, -1, "mean", va="center", fontsize=9)
    axes.set_yticks(range(len(shown)), [fill(label, 40) for label in shown])
    axes.set(xlim=(0, 1.08), ylim=(len(shown) - 0.4, -1.5), xlabel="share of blocks")
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    figure.legend(
        title="denoiser passes of a block", loc="outside lower center", ncols=len(_PASSES), frameon=False, fontsize=9,
        title_fontsize=9,
    )  # fmt: skip
    return figure


def _shares(result: Result) -> list[float]:
    """Of the blocks that take as many passes as each entry of ``_PASSES`` says."""
    counts = [
        sum(count for passes, count in result.passes_per_block.items() if low <= passes <= high)
        for low, high in _PASSES.values()
    ]
    return [count / result.blocks for count in counts]


def _bars(result: Result) -> list[str]:
    """What a bar shows of a result."""
    return [f"{result.mean_passes_per_block:.2f}", *(_percent(share, 0) for share in _shares(result))]


def unmasking(rows: Sequence[Row]) -> Figure | None:
    """In which pass the places of a block are decided, in the run with most blocks of several passes; and Kendall's
    tau of the runs that have such blocks."""
    ordered = [row for row in _distinct(_whole(rows)) if row.result.ordered_blocks]
    if not ordered:
        return None
    top = max(ordered, key=lambda row: (row.result.ordered_blocks, row.result.mean_passes_per_block))
    tau = top.result.tau or 0.0
    title = (
        f"{_capital(top.label)}: blocks fill {_order_in_words(tau)} (Kendall's tau {tau:.2f}, "
        f"{top.result.ordered_blocks:,} blocks)"
    )
    shown = _grouped(ordered, lambda result: (result.tau, result.ordered_blocks))
    most = sorted(shown.items(), key=lambda item: item[1].ordered_blocks)[-_MOST_TAUS:]
    figure, (left, right) = _figure(9.6, 4.2, title, 1, 2, width_ratios=(1.25, 1))
    counts = top.result.unmasking
    totals = [sum(column) or 1 for column in zip(*counts, strict=True)]
    shares = [[count / total for count, total in zip(row, totals, strict=True)] for row in counts]
    edges = (0.5, len(totals) + 0.5, 0.5, len(counts) + 0.5)
    image = left.imshow(shares, aspect="auto", origin="lower", extent=edges, cmap="viridis", vmin=0)
    left.set_xlabel("place of the token in its block", fontsize=9)
    left.set_ylabel("denoiser pass that decides it", fontsize=9)
    left.set_xticks(_ticks(len(totals)))
    left.set_yticks(_ticks(len(counts)))
    bar = figure.colorbar(image, format=PercentFormatter(1, decimals=0, symbol=" %"))
    bar.set_label("share of the tokens at a place", fontsize=9)
    bar.ax.tick_params(labelsize=9)
    right.barh(range(len(most)), [result.tau for _, result in most], color=COLORS[0], height=0.6)
    names = [f"{fill(label, 26)} ({result.ordered_blocks:,})" for label, result in most]
    right.set_yticks(range(len(most)), names, fontsize=8.5)
    right.axvline(0, color=_GRAY, linewidth=1)
    right.set(xlim=(-1, 1), xticks=(-1, 0, 1))
    right.set_xticklabels(("-1\nright to left", "0\nno order", "1\nleft to right"))
    right.set_xlabel("Kendall's tau, mean of the blocks\nof several passes (their number)", fontsize=9)
    return figure


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _order_in_words(tau: float) -> str:
    strength = "strictly" if abs(tau) > 0.9 else "mostly" if abs(tau) > 0.4 else "slightly"
    if abs(tau) < 0.1:
        return "in no order"
    return f"{strength} from {'left to right' if tau > 0 else 'right to left'}"


def agreement(rows: Sequence[Row]) -> Figure | None:
    """How often a draft's token is the one autoregression gives, by place, where all tokens before it are."""
    shown = [row for row in _distinct(_whole(rows)) if row.result.drafts]
    if not shown:
        return None
    groups = dict(list(_grouped(shown, lambda result: result.agreement).items())[:_MOST_LINES])
    rates = {label: [agreed / tried for agreed, tried in one.agreement if tried] for label, one in groups.items()}
    label, first = next(iter(rates.items()))
    lowest = min(range(len(first)), key=first.__getitem__)
    title = f"At every place of a draft {_percent(first[lowest])} of the tokens and more are AR's ({label})"
    figure, axes = _figure(7.6, 4.2, title)
    for number, (label, of_place) in enumerate(rates.items()):
        axes.plot(range(1, len(of_place) + 1), of_place, marker=MARKERS[number % len(MARKERS)], markersize=5,
                  color=COLORS[number % len(COLORS)], linewidth=1.2, label=fill(label, 44))  # fmt: skip
    everything = [rate for of_place in rates.values() for rate in of_place]
    _set_percent(axes, min(everything), max(everything))
    axes.set_xticks(_ticks(max(map(len, rates.values()))))
    axes.grid(alpha=0.25)
    tried = [count for _, count in shown[0].result.agreement if count]
    axes.set_xlabel(f"place of the token in its draft ({tried[0]:,} drafts at place 1, {tried[-1]:,} at the last)")
    axes.set_ylabel("equal to AR's token, all before it equal")
    columns = 3 if max(map(len, rates)) < 24 else 2
    figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=columns)
    return figure


def ablations(rows: Sequence[Row]) -> Figure | None:
    """Right answers when something is taken away from the denoiser."""
    sweeps = {row.sweep for row in rows if row.is_ablated}
    shown = [row for row in rows if row.sweep in sweeps]
    if not shown:
        return None
    worst = min(shown, key=lambda row: row.result.accuracy)
    whole = next((row for row in shown if not row.is_ablated), None)
    title = f"{_capital(worst.label)}: {_percent(worst.result.accuracy)} right"
    if whole is not None:
        title += f", {_percent(whole.result.accuracy)} as trained"
    figure, axes = _figure(7.6, 1.2 + 0.38 * len(shown), title)
    for place, row in enumerate(shown):
        axes.barh(place, row.result.accuracy, color=COLORS[1] if row.is_ablated else COLORS[0], height=0.68)
        words = f"{_percent(row.result.accuracy)}, {row.result.mean_passes_per_block:.2f} passes a block"
        inside = row.result.accuracy > 0.5
        axes.annotate(
            words, (row.result.accuracy, place), (-5 if inside else 5, 0), textcoords="offset points", fontsize=9,
            va="center", ha="right" if inside else "left", color="white" if inside else "black",
        )  # fmt: skip
    axes.set_yticks(range(len(shown)), [row.label for row in shown])
    axes.set(xlim=(0, 1), ylim=(len(shown) - 0.5, -0.5), xlabel="right answers")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    return figure


def _whole(rows: Sequence[Row]) -> list[Row]:
    """Without the sweeps that take something away."""
    sweeps = {row.sweep for row in rows if row.is_ablated}
    return [row for row in rows if row.sweep not in sweeps]


def _set_percent(axes: Axes, low: float, high: float) -> None:
    """A vertical axis of shares from ``low`` to ``high`` with some room, and no mark above 100 %."""
    room = max(0.002, 0.3 * (high - low))
    low, high = low - room, min(high + room, 1 + room / 2)
    axes.set_ylim(low, high)
    marks = [mark for mark in axes.get_yticks() if low <= mark <= min(1.0, high)]
    axes.set_yticks(marks)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1 if high - low < 0.1 else 0, symbol=" %"))


def _distinct(rows: Sequence[Row]) -> list[Row]:
    """Each run once, which may belong to several sweeps."""
    found: dict[str, Row] = {}
    for row in rows:
        found.setdefault(row.key, row)
    return list(found.values())


def _ticks(count: int) -> list[int]:
    """At most nine whole numbers from 1 on."""
    step = max(1, -(-count // 8))
    return sorted({1, *range(step, count + 1, step)})


PLOTS: dict[str, Callable[[Sequence[Row]], Figure | None]] = {
    "quality.png": quality,
    "steps_per_block.png": passes_per_block,
    "unmasking.png": unmasking,
    "agreement.png": agreement,
    "ablations.png": ablations,
}
