"""Short pieces of the running interpreter's standard library: code and the reference's prose, for the training mix."""

import random
import sysconfig
from collections.abc import Sequence
from functools import cache
from pathlib import Path

SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__", "pydoc_data", "encodings"}
LONGEST_LINE = 120  # characters; longer lines are data tables


@cache
def library_sources() -> tuple[str, ...]:
    """The text of every module of Lib/, in the order of its path, without tests and code pages."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in root.rglob("*.py") if not SKIPPED_FOLDERS & set(path.relative_to(root).parts))
    return tuple(path.read_text(encoding="utf-8", errors="replace") for path in paths)


@cache
def library_prose() -> tuple[str, ...]:
    """The topics of the language reference that come with the interpreter, in the order of their names."""
    from pydoc_data.topics import topics

    return tuple(topics[name] for name in sorted(topics))


def draw_piece(rng: random.Random, texts: Sequence[str], max_characters: int) -> str:
    """Whole lines from a random place of a random text, at most `max_characters` long and never empty."""
    while True:
        lines = rng.choice(texts).splitlines()
        if not lines:
            continue
        piece = _lines_within(lines[rng.randrange(len(lines)) :], max_characters)
        if piece.strip():
            return piece


def _lines_within(lines: list[str], max_characters: int) -> str:
    taken, length = [], 0
    for line in lines:
        length += len(line) + 1
        if length > max_characters or len(line) > LONGEST_LINE:
            break
        taken.append(line)
    return "\n".join(taken)
