"""Plots that can be read at a glance: no text hides another one or leaves the figure, and titles say what was found."""

from __future__ import annotations

from itertools import combinations

import pytest

pytest.importorskip("matplotlib")
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

from vllm_twotower.experiments.figures import (
    Row,
    ablations,
    agreement,
    draw_all,
    passes_per_block,
    quality,
    unmasking,
)
from vllm_twotower.experiments.labels import merged_label
from vllm_twotower.experiments.measures import Result
from vllm_twotower.experiments.runs import label


def result(right: int, tokens_per_pass: float, passes: dict[int, int] | None = None, **fields) -> Result:
    """Of 400 problems."""
    defaults = {
        "problems": 400,
        "right": right,
        "tokens": round(1000 * tokens_per_pass),
        "passes": 1000,
        "right_by_family": {"": [right, 400]},
        "passes_per_block": passes or {},
        "unmasking": [],
        "tau": None,
        "ordered_blocks": 0,
        "drafts": 0,
        "accepted": 0,
        "agreement": [],
    }
    return Result(**defaults | fields)


def row(sweep: str, label: str, of: Result, **flags) -> Row:
    return Row(f"{sweep}/{label}", sweep, label, of, **flags)


def order(places: int, passes: int) -> list[list[int]]:
    """Place i is decided in pass i at the latest."""
    return [[10 if n == i * passes // places else 2 * (n < i) for i in range(places)] for n in range(passes)]


def rows(crowded: bool) -> list[Row]:
    """Those of a small experiment, or of one with many runs that are hardly apart."""
    made = [row("autoregressive", "autoregressive", result(399, 1.0), is_ar=True)]
    thresholds = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0) if crowded else (0.8, 1.0)
    for number, threshold in enumerate(thresholds):
        last = threshold == 1
        of = result(
            390 + number, 0.8 if last else 12.7 - 0.06 * number, {16: 800} if last else {1: 780, 2: 15, 5: 5},
            unmasking=order(16, 16) if last else order(16, 2), tau=0.83 if last else 0.31,
            ordered_blocks=1203 if last else 20,
        )  # fmt: skip
        made.append(row("threshold", f"threshold {threshold:g}", of))
    for steps in (1, 2, 4, 16, 32) if crowded else (16,):
        of = result(389 + min(steps, 5), 12.7 - 0.05 * min(steps, 4), {1: 500, 2: 300}, ordered_blocks=300, tau=0.2)
        made.append(row("steps", label({"max_steps": steps}), of))
    for width in (4, 8, 32):
        made.append(row("width", f"width {width}", result(396 if width < 32 else 160, width * 0.9, {1: 300})))
    for passes in (1, 2, 4):
        agreed = [[400 - 3 * i * (4 // passes), 400] for i in range(15)]
        of = result(399, 5.1, {passes: 400}, drafts=400, accepted=4400, agreement=agreed)
        made.append(row("verified", label({"draft_steps": passes}), of))
    for threshold in thresholds if crowded else ():
        agreed = [[400 - round(threshold * 9 * i), 400] for i in range(15)]
        of = result(399, 5.1, {2: 400}, drafts=400, accepted=4400, agreement=agreed)
        made.append(row("verified", label({"draft_steps": 2, "confidence_threshold": threshold}), of))
    for strategy in ("confidence_unmasking", "predict_and_noise") if crowded else ():
        for steps in (16, 32):
            tokens = 12.4 if strategy == "confidence_unmasking" else 12.7
            of = result(396, tokens, {1: 700, steps: 100}, tau=0.5, ordered_blocks=100, unmasking=order(16, 16))
            made.append(row("strategy", label({"strategy": strategy, "max_steps": steps}), of))
    made.append(row("ablation", "as trained", result(397, 12.4, {1: 800})))
    for name, right in (("t always 0.5", 396), ("no Mamba seed", 0), ("without layers 1, 2, 3, 4", 200)):
        made.append(row("ablation", name, result(right, 3.0, {1: 800}), is_ablated=True))
    return made


def texts_of(figure: Figure) -> list[Text]:
    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]


@pytest.mark.parametrize("crowded", [False, True])
@pytest.mark.parametrize("draw", [quality, passes_per_block, unmasking, agreement, ablations])
def test_no_text_hides_another_or_leaves_the_figure(draw, crowded: bool, tmp_path):
    figure = draw(rows(crowded))
    figure.savefig(tmp_path / "plot.png")  # as it is written
    shown = [(text.get_text(), Text.get_window_extent(text)) for text in texts_of(figure)]
    shown = [(words, box) for words, box in shown if box.width]
    assert len(shown) > 8
    whole = figure.bbox
    outside = [words for words, box in shown if not (whole.x0 <= box.x0 and box.x1 <= whole.x1)]
    outside += [words for words, box in shown if not (whole.y0 <= box.y0 and box.y1 <= whole.y1)]
    assert outside == []
    for annotation in figure.findobj(Annotation):
        axes, box = annotation.axes.get_window_extent(), Text.get_window_extent(annotation)
        assert axes.x0 <= box.x0 < box.x1 <= axes.x1, annotation.get_text()
    assert [(a[0], b[0]) for a, b in combinations(shown, 2) if a[1].padded(-1).overlaps(b[1].padded(-1))] == []


def test_every_run_near_the_best_has_a_label():
    figure = quality(rows(crowded=True))
    words = ", ".join(text.get_text() for text in figure.findobj(Annotation)).replace("\n", ", ").split(", ")
    assert {"0.5", "0.8", "0.95", "1"} <= set(words)
    assert "(below the plot: width 32 with 40 %)" in figure.get_supxlabel()


def test_titles_say_what_was_found():
    found = rows(crowded=False)
    titles = {draw: figure_title(draw(found)) for draw in (quality, passes_per_block, unmasking, agreement, ablations)}
    assert titles == {
        quality: "99.2 % of AR's right answers at 7.2 tokens a pass (width 8)",
        passes_per_block: "Width 8: 100 % of blocks take one pass, the mean is 1.00",
        unmasking: "Threshold 1: blocks fill mostly from left to right (Kendall's tau 0.83, 1,203 blocks)",
        agreement: "At every place of a draft 58.0 % of the tokens and more are AR's (drafts of 1 pass)",
        ablations: "No Mamba seed: 0.0 % right, 99.2 % as trained",
    }


def test_labels_are_merged_where_they_differ():
    def merged(*labels: str) -> str:
        return merged_label(labels).replace("\N{NO-BREAK SPACE}", " ")

    assert merged("at most 4 passes", "at most 16 passes") == "at most 4, 16 passes"
    assert merged("threshold 0.8") == "threshold 0.8"
    assert merged("temperature 1, seed 0", "temperature 1, seed 1") == "temperature 1, seed 0, 1"
    assert merged("a, at most 4 passes", "b, at most 4 passes") == "a, at most 4 passes; b, at most 4 passes"
    assert merged("verified", "autoregressive") == "verified, autoregressive"
    assert merged("t 1, seed 0", "t 2, seed 0", "t 2, seed 1") == "t 1, seed 0; 2, seed 0; 2, seed 1"


def figure_title(figure: Figure) -> str:
    return figure.get_suptitle().replace("\n", " ")


def test_what_there_is_no_data_for_is_not_drawn(tmp_path):
    assert draw_all(rows(crowded=False)[:1], tmp_path) == []
    assert draw_all(rows(crowded=False)[:3], tmp_path) == ["quality.png", "steps_per_block.png", "unmasking.png"]
