"""The results of an experiment as one Markdown page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .figures import Row
from .measures import Result

CAPTIONS = {
    "quality.png": "Right answers against tokens per pass, a line for each sweep; dashed: autoregression.",
    "steps_per_block.png": "Denoiser passes that blocks take.",
    "unmasking.png": "The pass in which each place of a block is decided, in the run with most blocks of several "
    "passes; and Kendall's tau of place and pass: 1 from left to right, -1 from right to left.",
    "agreement.png": "Agreement with autoregression by place: of the verified drafts that agree with it up to a place, "
    "the share that agrees there too.",
    "ablations.png": "Right answers when something is taken away from the denoiser.",
}


def markdown(
    title: str, introduction: Sequence[str], rows: Sequence[Row], identical: Mapping[str, int], plots: Sequence[str]
) -> str:
    """All tables and plots; ``identical`` has the texts of each run, by key, that are those of autoregression."""
    ar = next((row.result for row in rows if row.is_ar), None)
    lines = [f"# {title}", "", *introduction]
    for sweep in dict.fromkeys(row.sweep for row in rows):
        of_sweep = [row for row in rows if row.sweep == sweep]
        lines += ["", f"## {sweep}", "", *_table(of_sweep, ar, identical)]
    lines += ["", "## Plots", ""]
    for name in plots:
        lines += [f"![{CAPTIONS[name]}]({name})", "", CAPTIONS[name], ""]
    return "\n".join(lines).rstrip() + "\n"


def _table(rows: Sequence[Row], ar: Result | None, identical: Mapping[str, int]) -> list[str]:
    """One line a run; columns without a number are left out."""
    columns = {
        "run": [row.label for row in rows],
        "right": [f"{row.result.right} of {row.result.problems}" for row in rows],
        "share": [f"{row.result.accuracy:.1%}" for row in rows],
        "of AR": [f"{row.result.accuracy / ar.accuracy:.1%}" if ar and ar.right else "" for row in rows],
        "texts as AR's": [str(identical.get(row.key, "")) for row in rows],
        "tokens per pass": [f"{row.result.tokens_per_pass:.2f}" for row in rows],
        "passes a block": [_number(row.result.mean_passes_per_block, row.result.blocks) for row in rows],
        "Kendall's tau (blocks)": [
            "" if row.result.tau is None else f"{row.result.tau:.2f} ({row.result.ordered_blocks})" for row in rows
        ],
        "accepted a draft": [_number(row.result.accepted_per_draft, row.result.drafts) for row in rows],
    }
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return lines + [f"| {' | '.join(cells)} |" for cells in zip(*columns.values(), strict=True)]


def _number(mean: float, count: int) -> str:
    return f"{mean:.2f}" if count else ""
