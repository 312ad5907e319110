"""Labels beside points: each is put where it hides no other one and no marker, and as little else as can be."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import cos, pi, sin
from textwrap import fill
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.text import Text
from matplotlib.transforms import Bbox

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.transforms import Transform

_DISTANCES = (8, 12, 18, 26, 36, 48, 62, 78, 96, 120)
"""In points, the nearest first."""
_ANGLES = tuple(pi * sixteenth / 8 for sixteenth in (0, 8, 4, -4, 2, -2, 6, -6, 1, -1, 7, -7, 3, -3, 5, -5))
_MARKER = 4.0
_LINE = 24
"""The longest line of a label."""
_NEAR = 12
"""Up to so many points away a label needs no line to its marker."""


def place_labels(
    figure: Figure, axes: Axes, points: Sequence[tuple[float, float]], texts: Sequence[str], color: str
) -> None:
    """Annotates points (in data coordinates); labels whose points lie on each other are one.

    Call it last: neither the limits nor the layout may change afterwards.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    scale, inside = figure.dpi / 72, axes.get_window_extent()
    pixels = axes.transData.transform(np.array(points, dtype=float).reshape(-1, 2))
    fixed = [_around(point, _MARKER * scale) for point in pixels]
    fixed += [text.get_window_extent() for text in axes.texts]
    others = [_around(point, scale) for line in axes.lines for point in _sampled(line.get_transform(), line)]
    for dots in axes.collections:
        others += [_around(point, 3 * scale) for point in dots.get_offset_transform().transform(dots.get_offsets())]
    for (x, y), text in _merged(pixels, texts, _MARKER * scale):
        label = axes.annotate(
            text, tuple(axes.transData.inverted().transform((x, y))), (0, 0), textcoords="offset points",
            fontsize=9, color=color, va="center", ha="center",
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.7, "alpha": 0.6, "shrinkB": 3},
        )  # fmt: skip
        extent = Text.get_window_extent(label)
        best, fewest = None, float("inf")
        for distance, angle in product(_DISTANCES, _ANGLES):
            # From the marker to the label's edge, whichever way it goes.
            dx = distance * scale * cos(angle) + extent.width / 2 * _sign(cos(angle))
            dy = distance * scale * sin(angle) + extent.height / 2 * _sign(sin(angle))
            half = extent.width / 2
            dx = min(max(dx, inside.x0 + half + scale - x), inside.x1 - half - scale - x)  # pushed inside
            box = Bbox.from_bounds(x + dx - half, y + dy - extent.height / 2, extent.width, extent.height)
            if not (inside.y0 < box.y0 and box.y1 < inside.y1):
                continue
            hidden = 100 * box.count_overlaps(fixed) + box.count_overlaps(others)
            if hidden < fewest:
                best, fewest = (dx / scale, dy / scale, box, distance), hidden
            if not hidden:
                break
        if best is None:
            continue
        label.set_position(best[:2])
        if label.arrow_patch is not None:
            label.arrow_patch.set_visible(best[3] > _NEAR)
        fixed.append(best[2].padded(scale))


def _sign(value: float) -> float:
    return 0.0 if abs(value) < 1e-6 else 1.0 if value > 0 else -1.0


def _around(point: np.ndarray, radius: float) -> Bbox:
    return Bbox.from_extents(*(point - radius), *(point + radius))


def _sampled(transform: Transform, line: Line2D) -> np.ndarray:
    """Points along a line, in pixels."""
    corners = transform.transform(line.get_xydata())
    parts = [np.linspace(a, b, 60) for a, b in zip(corners[:-1], corners[1:], strict=True)]
    return np.concatenate(parts) if parts else corners


def _merged(pixels: np.ndarray, texts: Sequence[str], radius: float) -> list[tuple[tuple[float, float], str]]:
    """Points and texts, where points that hide each other are one."""
    found: list[tuple[np.ndarray, list[str]]] = []
    for point, text in zip(pixels, texts, strict=True):
        near = next((one for one in found if np.abs(one[0] - point).max() < radius), None)
        if near is None:
            found.append((point, [text]))
        elif text not in near[1]:
            near[1].append(text)
    return [((float(x), float(y)), fill(merged_label(words), _LINE)) for (x, y), words in found]


def without_common_start(labels: Sequence[str]) -> list[str]:
    """What is left of labels without the words that all begin with."""
    common = _common([label.split(" ") for label in labels])
    return [" ".join(label.split(" ")[common:]) for label in labels]


def merged_label(labels: Sequence[str]) -> str:
    """One label for several, with the words that all begin or end with said once; it is not broken within the rest."""
    if len(labels) == 1:
        return labels[0]
    words = [label.split(" ") for label in labels]
    first = _common(words)
    last = _common([one[first:][::-1] for one in words])
    if any(one[len(one) - last - 1].endswith(",") for one in words):
        last = 0
    rest = ["\N{NO-BREAK SPACE}".join(one[first : len(one) - last]) for one in words]
    middle = ("; " if any("," in one for one in rest) else ", ").join(rest)
    return " ".join(filter(None, (*words[0][:first], middle, *words[0][len(words[0]) - last :])))


def _common(words: Sequence[Sequence[str]]) -> int:
    """So many words are the first of all, each of which has one more."""
    common = 0
    while len(words) > 1 and all(len(one) > common + 1 and one[common] == words[0][common] for one in words):
        common += 1
    return common
