"""A recording in the terminal, redrawn frame by frame; over a pipe one line of plain text a pass."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TextIO

from vllm_twotower.watch.look import CLASSES, confidence_class, figures, flow, printable, progress, title, width_of
from vllm_twotower.watch.recording import Cell, Moment, Recording

HIDE_CURSOR, SHOW_CURSOR, RESET = "\x1b[?25l", "\x1b[?25h", "\x1b[0m"
PANEL = 24
"""Columns of the figures beside the text, where there is room for them."""
ROOM_FOR_PANEL = 72
MASKS = {True: "\u2591", False: "_"}
NEWLINES = {True: "\u23ce", False: "\\n"}
Piece = tuple[str, str]
"""A text and its style, a key of :meth:`Screen.style`."""


def is_plain(stream: TextIO, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether escape sequences must not be written to a stream."""
    return not stream.isatty() or environment.get("TERM", "") in ("", "dumb")


def can_encode(stream: TextIO) -> bool:
    """Whether a stream takes more than ASCII."""
    try:
        "\u2591\u23ce".encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def plain_lines(recording: Recording, moment: Moment, unicode: bool = True) -> list[str]:
    """A frame as text: a line for a pass, or for tokens of the context tower; none for an empty canvas."""
    frame = moment.frame
    mask, newline = MASKS[unicode], NEWLINES[unicode]
    if not frame.cells:
        if frame.last:
            return []
        return [
            f"token {frame.tokens:3}                    |{_plain(recording.text[frame.tokens - 1], mask, newline)}|"
        ]
    if frame.number == 0:
        return []
    canvas = "".join(_plain(cell, mask, newline) for cell in frame.cells).replace("-][-", "")
    if frame.verified:
        stay = sum(cell.state == "accepted" for cell in frame.cells)
        drafted = sum(cell.state in ("accepted", "rejected", "cut") for cell in frame.cells)
        return [f"block {frame.block:3}  verified {f'{stay}/{drafted}':>5}  |{canvas}|"]
    decided = sum(cell.state != "mask" for cell in frame.cells)
    pass_of = f"{frame.number}/{frame.of}"
    return [f"block {frame.block:3}  pass {pass_of:>5}  {decided:2}/{len(frame.cells)} |{canvas}|"]


def _plain(cell: Cell, mask: str, newline: str) -> str:
    text = printable(cell.text, newline)
    if cell.state == "mask":
        return _masked(text, mask)
    return f"[-{text}-]" if cell.state == "rejected" else text


def _masked(text: str, mask: str) -> str:
    """As many masks as the token will take columns; its space stays, so that nothing moves when it is decided."""
    space = text[:1] == " " and len(text) > 1
    return " " * space + "".join("\n" if c == "\n" else mask * width_of(c) for c in text[space:])


class Screen:
    """The lines at the end of a terminal that show the present moment."""

    def __init__(self, stream: TextIO, environment: Mapping[str, str] = os.environ):
        self.stream = stream
        self.colours = not environment.get("NO_COLOR")
        self.truecolor = environment.get("COLORTERM", "") in ("truecolor", "24bit")
        unicode = can_encode(stream)
        self.mask, self.newline = MASKS[unicode], NEWLINES[unicode] + "\n"
        self._drawn: list[int] = []  # the widths of the lines drawn last

    def draw(self, recording: Recording, moment: Moment, rival: Recording | None = None, last: bool = False) -> None:
        """Puts a moment in the place of the one before; the ``last`` one in full, even where the screen is too low."""
        width, height = shutil.get_terminal_size()
        lines = self.lines(recording, moment, rival, width, None if last else height - 1)
        # A line that was as wide as the terminal then was takes more rows where that is narrower now.
        rows = sum(max(1, -(-drawn // width)) for drawn in self._drawn)
        up = f"\x1b[{min(rows, height - 1)}F" if rows else ""
        body = "".join(self.paint(line) + "\x1b[K\n" for line in lines)
        encoding = self.stream.encoding or "ascii"
        self.stream.write(up + "\x1b[J" + body.encode(encoding, "replace").decode(encoding))
        self.stream.flush()
        self._drawn = [_length(line) for line in lines]

    def paint(self, line: Sequence[Piece]) -> str:
        """A line with the escape sequences of its styles."""
        painted = ""
        for style, pieces in groupby(line, key=lambda piece: piece[1]):
            text, codes = "".join(text for text, _ in pieces), self.style(style)
            painted += f"\x1b[{codes}m{text}{RESET}" if codes else text
        return painted

    def style(self, name: str) -> str:
        """The codes of a style: a name, or the number of a class of confidence, with + if new and _ if underlined."""
        number = name.rstrip("+_")
        if not number.isdigit():
            rejected = "9;31" if self.colours else "9"
            return {"dim": "2", "mask": "2", "bold": "1", "rejected": rejected, "cut": "2;3"}.get(name, "")
        codes = [{"+": "1", "_": "4"}[mark] for mark in name[len(number) :]]
        return ";".join([*codes, *([self._on(CLASSES[int(number)][2])] if self.colours else [])])

    def _on(self, colour: str) -> str:
        """Black text on a colour."""
        red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        if self.truecolor:
            return f"38;2;20;20;20;48;2;{red};{green};{blue}"
        index = 16 + 36 * _cube(red) + 6 * _cube(green) + _cube(blue)
        return f"38;5;16;48;5;{index}"

    def lines(
        self, recording: Recording, moment: Moment, rival: Recording | None, width: int, height: int | None
    ) -> list[list[Piece]]:
        """The lines of a moment, none wider than ``width``; of texts too long for ``height`` the end is shown."""
        frame = moment.frame
        head = _wrap(title(recording), width, "dim")
        words = [*figures(recording, frame.tokens, frame.passes), progress(frame)]
        parts = [(recording, printable(recording.prompt, "\n"), frame.tokens, frame.cells, words)]
        if rival:
            words = figures(rival, moment.rival_tokens, moment.rival_tokens)
            parts.append((rival, "", moment.rival_tokens, (), words))
        legend = [[], *self._legend(width)] if self.colours else []
        room = None
        if height:
            room = max(3, (height - len(head) - len(legend) - 2 * len(parts)) // len(parts))
        found: list[list[Piece]] = []
        for whose, prompt, tokens, cells, words in parts:
            found += [[]] * bool(found) + _wrap(title(whose), width, "dim")
            found += self._part(whose, prompt, tokens, cells, words, width, room)
        found += legend
        return found if height is None else found[-height:]

    def _part(
        self,
        whose: Recording,
        prompt: str,
        tokens: int,
        cells: Sequence[Cell],
        words: list[str],
        width: int,
        room: int | None,
    ) -> list[list[Piece]]:
        beside = width >= ROOM_FOR_PANEL
        text_width = width - PANEL - 2 if beside else width
        texts, styles = [prompt], ["dim"]
        for cell in [*whose.text[:tokens], *cells]:
            text = printable(cell.text, self.newline)
            texts.append(_masked(text, self.mask) if cell.state == "mask" else text)
            styles.append(_style(cell))
        lines = [[(piece, styles[index]) for index, piece in line] for line in flow(texts, text_width)]
        below = [] if beside else _wrap(", ".join(filter(None, words)), width, "bold")
        if room and len(lines) + len(below) > room:
            lines = lines[len(lines) + len(below) - room :]
        if beside:
            lines += [[] for _ in range(len(words) - len(lines))]
            # The figures stay where they are, beside the last lines.
            for line, word in zip(lines[: len(words)], words, strict=True):
                line += [(" " * (text_width + 2 - _length(line)), ""), (word[:PANEL], "bold")]
        return lines + below

    def _legend(self, width: int) -> list[list[Piece]]:
        texts = ["confidence:", *(f" {name.replace(' to ', '-').replace(' ', '')}" for _, name, _ in CLASSES)]
        styles = ["dim", *map(str, range(len(CLASSES)))]
        if can_encode(self.stream):
            texts[1], texts[-1] = " \u226599%", " <50%"
        return [[(piece, styles[index]) for index, piece in line] for line in flow(texts, width)]


def _style(cell: Cell) -> str:
    if cell.state in ("mask", "rejected", "cut"):
        return cell.state
    number = confidence_class(cell.confidence)
    if number is None:
        return "bold" if cell.state == "new" else ""
    # The context tower's own token stands out behind a draft, not where it gives them all.
    own = cell.state == "context" and cell.block is not None
    return f"{number}{'+' * (cell.state == 'new')}{'_' * own}"


def _cube(value: int) -> int:
    """The nearest of six steps of the 256 colours."""
    return min(range(6), key=lambda i: abs((0, 95, 135, 175, 215, 255)[i] - value))


def _length(line: Sequence[Piece]) -> int:
    return sum(width_of(text) for text, _ in line)


def _wrap(text: str, width: int, style: str) -> list[list[Piece]]:
    return [[(piece, style) for _, piece in line] for line in flow([printable(text)], width)]


@contextmanager
def hidden_cursor(stream: TextIO) -> Iterator[None]:
    """The cursor is shown again and colours end, however the block ends."""
    stream.write(HIDE_CURSOR)
    stream.flush()
    try:
        yield
    finally:
        stream.write(RESET + SHOW_CURSOR)
        stream.flush()


@contextmanager
def notice(stream: TextIO, text: str) -> Iterator[None]:
    """A line on the terminal while the block runs."""
    stream.write(text)
    stream.flush()
    try:
        yield
    finally:
        stream.write("\r\x1b[K")
        stream.flush()
