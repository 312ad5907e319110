"""A recording as a moving picture: SVG that plays by itself, also as an image in a README."""

from __future__ import annotations

import re
from collections import defaultdict
from xml.sax.saxutils import escape

from vllm_twotower.watch.look import (
    CLASSES,
    UNKNOWN,
    confidence_class,
    figures,
    flow,
    printable,
    progress,
    shown_slower,
    title,
    width_of,
)
from vllm_twotower.watch.recording import Cell, Recording, timeline

COLUMNS = 84
ADVANCE, LINE, MARGIN = 9, 25, 24
WIDTH = COLUMNS * ADVANCE + 2 * MARGIN
SECONDS_A_MOMENT = 0.35
SECONDS_AT_THE_END = 4.0
Drawn = dict[str, list[int]]
"""Elements and the moments in which each of them is seen."""

STYLE = """
text{font:15px ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace;white-space:pre;fill:#1d1d22}
.f{fill:#62626c}.b{font-weight:700}.s{font-size:13px}.n{fill:none;stroke:#5b3aa8;stroke-width:2}
.r{fill:#8a8a94;text-decoration:line-through}.u{fill:#8a8a94}.w{stroke:#1d1d22;stroke-width:1.5}
@media(prefers-reduced-motion:reduce){*{animation:none!important}}
"""


def picture(recording: Recording, rival: Recording | None = None) -> str:
    """The picture, which begins anew when it has been seen; ``rival`` is the same prompt token by token."""
    moments = timeline(recording, rival)
    slower = shown_slower(moments, SECONDS_A_MOMENT)
    starts = [(moment.seconds - moments[0].seconds) * slower for moment in moments]
    length = starts[-1] + SECONDS_AT_THE_END
    drawn: Drawn = defaultdict(list)
    lines = rival_lines = 1
    for place, moment in enumerate(moments):
        frame = moment.frame
        cells = [*recording.text[: frame.tokens], *frame.cells]
        lines = max(lines, _draw_text(drawn, place, recording.prompt, cells, frame.tokens, 2))
    top = lines + 2
    for place, moment in enumerate(moments):
        frame = moment.frame
        words = figures(recording, frame.tokens, frame.passes)
        where = progress(frame) or ("finished" if frame.last else "")
        _draw_figures(drawn, place, ", ".join(words), where, top + 1)
    if rival:
        top += 3
        for place, moment in enumerate(moments):
            found = _draw_text(drawn, place, "", rival.text[: moment.rival_tokens], moment.rival_tokens, top + 1)
            rival_lines = max(rival_lines, found)
        for place, moment in enumerate(moments):
            words = figures(rival, moment.rival_tokens, moment.rival_tokens)
            where = "finished" if moment.rival_tokens == len(rival.text) else ""
            _draw_figures(drawn, place, ", ".join(words), where, top + rival_lines + 1)
    fixed = [_text(0, 0.4, f"{title(recording)}; shown {slower:.0f} times slower", "f s")]
    if rival:
        fixed.append(_text(0, top - 0.2, title(rival), "f s"))
    bottom = top + (rival_lines + 1 if rival else 1)
    fixed += _legend(bottom + 1.6)
    height = round((bottom + 2.4) * LINE + MARGIN)
    return _document(title(recording), height, fixed, drawn, starts, length)


def _document(name: str, height: int, fixed: list[str], drawn: Drawn, starts: list[float], length: float) -> str:
    spans: dict[tuple[bool, int, int], list[str]] = defaultdict(list)
    for element, places in drawn.items():
        # Colours lie below texts and outlines, whichever came first.
        is_above = "fill=" not in element
        for first, last in _runs(places):
            spans[is_above, first, last].append(element)
    groups = [
        f'<g class="k{first}_{last}">{"".join(elements)}</g>' for (_, first, last), elements in sorted(spans.items())
    ]
    style = [STYLE, *(_animation(*span, starts, length) for span in sorted({span[1:] for span in spans}))]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img"><title>{_clean(f"A completion being made, block by block: {name}")}</title>'
        f"<style>{''.join(style)}</style>"
        '<defs><pattern id="m" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<rect width="6" height="6" fill="#d2d2da"/><rect width="3" height="6" fill="#bcbcc6"/></pattern></defs>'
        f'<rect x="1" y="1" width="{WIDTH - 2}" height="{height - 2}" rx="12" fill="#fff" stroke="#d0d0d8"/>'
        f"{''.join(fixed)}{''.join(groups)}</svg>\n"
    )


def _animation(first: int, last: int, starts: list[float], length: float) -> str:
    """CSS that shows a group from one moment up to another; where nothing moves, if that is the last one."""
    stays = last == len(starts)
    if stays and not first:
        return ""
    before = "0%{opacity:0}" if first else ""
    after = "" if stays else f"{100 * starts[last] / length:.3f}%{{opacity:0}}"
    name = f"k{first}_{last}"
    return (
        f"@keyframes {name}{{{before}{100 * starts[first] / length:.3f}%{{opacity:1}}{after}}}"
        f".{name}{{{'' if stays else 'opacity:0;'}animation:{name} {length:.2f}s step-end infinite}}"
    )


def _runs(places: list[int]) -> list[tuple[int, int]]:
    """Neighbouring places as (first, one behind the last)."""
    found: list[tuple[int, int]] = []
    for place in places:
        if found and found[-1][1] == place:
            found[-1] = found[-1][0], place + 1
        elif not found or found[-1][1] < place:
            found.append((place, place + 1))
    return found


def _draw_text(drawn: Drawn, place: int, prompt: str, cells: list[Cell], committed: int, top: float) -> int:
    """Adds prompt and tokens as they stand in a moment; returns the number of lines."""
    texts = [printable(prompt, "\n"), *(printable(cell.text) for cell in cells)]
    lines = flow(texts, COLUMNS)
    for row, line in enumerate(lines):
        column = 0
        for index, piece in line:
            if index == 0:
                drawn[_text(column, top + row, piece, "f")].append(place)
            else:
                for element in _token(column, top + row, piece, cells[index - 1]):
                    drawn[element].append(place)
                if index > committed and cells[index - 1].state == "new":
                    drawn[_box(column, top + row, piece, 'class="n"')].append(place)
            column += width_of(piece)
    return len(lines)


def _draw_figures(drawn: Drawn, place: int, words: str, where: str, top: float) -> None:
    drawn[_text(0, top, where, "b")].append(place)
    drawn[_text(COLUMNS - len(words), top, words, "b")].append(place)


def _token(column: int, row: float, piece: str, cell: Cell) -> list[str]:
    if cell.state == "mask":
        space = piece[:1] == " " and len(piece) > 1
        return [_box(column + space, row, piece[space:], 'fill="url(#m)"')]
    if cell.state in ("rejected", "cut"):
        return [_text(column, row, piece, "r" if cell.state == "rejected" else "u")]
    number = confidence_class(cell.confidence)
    colour = UNKNOWN if number is None else CLASSES[number][2]
    found = [_box(column, row, piece, f'fill="{colour}"'), _text(column, row, piece, "")]
    if cell.state == "context" and cell.block is not None:
        y = round(row * LINE) + MARGIN + 8
        found.append(f'<path d="M{_x(column)} {y}h{width_of(piece) * ADVANCE}" class="w"/>')
    return found


def _legend(row: float) -> list[str]:
    found, column = [_text(0, row, "confidence", "f s")], 10
    for _, name, colour in CLASSES:
        found += [_box(column, row, f" {name} ", f'fill="{colour}"'), _text(column + 1, row, name, "s", 7.8)]
        column += len(name) + 2
    found += [_box(column + 1, row, "    ", 'fill="url(#m)"'), _text(column + 6, row, "mask", "f s")]
    return found


def _x(column: int) -> int:
    return MARGIN + column * ADVANCE


def _box(column: int, row: float, text: str, look: str) -> str:
    y = round(row * LINE) + MARGIN - 12
    return f'<rect x="{_x(column)}" y="{y}" width="{width_of(text) * ADVANCE}" height="20" rx="3" {look}/>'


def _text(column: int, row: float, text: str, name: str, advance: float = ADVANCE) -> str:
    if not text.strip():
        return ""
    # The length is given, as fonts differ; small text may have its own.
    space = len(text) - len(text.lstrip(" "))
    found = text[space:].rstrip(" ")
    length = (
        "" if "s" in name.split() else f' textLength="{width_of(found) * advance:g}" lengthAdjust="spacingAndGlyphs"'
    )
    look = f' class="{name}"' if name else ""
    y = round(row * LINE) + MARGIN + 3
    return f'<text x="{_x(column + space)}" y="{y}"{length}{look}>{_clean(found)}</text>'


def _clean(text: str) -> str:
    """Text for XML, which has no place for some characters."""
    return escape(re.sub("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text))
