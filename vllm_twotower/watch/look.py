"""What the terminal, the page and the picture share: colours of confidence, words for figures, and text in lines."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from vllm_twotower.watch.recording import Frame, Moment, Recording

CLASSES = (
    (0.99, "99 % and more", "#9ccbf7"),
    (0.9, "90 to 99 %", "#bfe3de"),
    (0.7, "70 to 90 %", "#f4e8a4"),
    (0.5, "50 to 70 %", "#f8c47d"),
    (0.0, "below 50 %", "#f2957a"),
)
"""Classes of confidence, from the surest: least probability, name, and a colour that dark text can be read on.

From blue to orange, which colour-blind readers can tell apart.
"""
UNKNOWN = "#d9d9de"
"""The colour of tokens whose probability is not known."""


def confidence_class(confidence: float | None) -> int | None:
    """The index in ``CLASSES``."""
    if confidence is None:
        return None
    return next((i for i, (least, _, _) in enumerate(CLASSES) if confidence >= least), len(CLASSES) - 1)


def printable(text: str, newline: str = "\u23ce\n") -> str:
    """A text without control characters, which could otherwise steer a terminal; line breaks stay, and are shown."""
    shown = {"\n": newline, "\t": " "}
    return "".join(
        shown.get(c, "\u00b7" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") else c) for c in text
    )


def width_of(text: str) -> int:
    """The columns a text takes in a terminal."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def flow(texts: Sequence[str], width: int) -> list[list[tuple[int, str]]]:
    """Lines of at most ``width`` columns; each is a list of pieces, with the index of the text that a piece is of.

    A line ends before a word, which may be several texts long, or within one that no line can hold.
    """
    lines: list[list[tuple[int, str]]] = [[]]
    used = 0
    for word in _words(texts):
        length = sum(width_of(piece.rstrip("\n")) for _, piece in word)
        # Where a line begins anew, the space before its first word goes.
        stripped = length - (word[0][1][:1] == " ")
        if used and used + length > width and stripped <= width:
            lines.append([])
            used = 0
            word[0] = (word[0][0], word[0][1].removeprefix(" "))
        for index, piece in word:
            start = 0
            for end, character in enumerate(piece):
                if character == "\n" or used + width_of(character) > width:
                    lines[-1].append((index, piece[start:end]))
                    lines.append([])
                    used, start = 0, end + (character == "\n")
                used += 0 if character == "\n" else width_of(character)
            lines[-1].append((index, piece[start:]))
    return [[(index, piece) for index, piece in line if piece] for line in lines]


def _words(texts: Sequence[str]) -> list[list[tuple[int, str]]]:
    words: list[list[tuple[int, str]]] = []
    for index, text in enumerate(texts):
        start = 0
        for i, character in enumerate(text):
            if character == " " and (i == 0 or text[i - 1] != " "):
                if i > start:
                    _extend(words, index, text[start:i])
                start = i
        if start < len(text):
            _extend(words, index, text[start:])
    return words


def _extend(words: list[list[tuple[int, str]]], index: int, piece: str) -> None:
    if not words or piece.startswith(" ") or words[-1][-1][1].endswith("\n"):
        words.append([])
    words[-1].append((index, piece))


def title(recording: Recording) -> str:
    """The model, the mode and the settings."""
    settings = [f"{name} {value:g}" for name, value in recording.settings.items()]
    return ", ".join([recording.model, recording.mode, *settings])


def progress(frame: Frame) -> str:
    """Where a frame is: block and pass."""
    if not frame.cells:
        return ""
    if frame.verified:
        return f"block {frame.block}, verified"
    return f"block {frame.block}, pass {frame.number} of {frame.of}" if frame.number else f"block {frame.block}, masks"


def figures(recording: Recording, tokens: int, passes: int) -> list[str]:
    """Counts so far: tokens, tokens a pass, tokens/s of the engine."""
    found = [f"{tokens} token{'s' * (tokens != 1)}"]
    if tokens and passes:
        found.append(f"{tokens / passes:.1f} tokens a pass")
    if rate := recording.rate(tokens):
        found.append(f"{rate:.0f} tokens/s" if rate >= 10 else f"{rate:.2g} tokens/s")
    return found


def shown_slower(moments: Sequence[Moment], seconds: float) -> float:
    """How many times slower to show moments than they happened, so that one is seen for some seconds on average."""
    length = moments[-1].seconds - moments[0].seconds
    return seconds * (len(moments) - 1) / length if length > 0 else 1.0
