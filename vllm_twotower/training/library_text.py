"""Short pieces of the running interpreter's standard-library sources: the general text in the training mix."""

import random
import sysconfig
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


def draw_piece(rng: random.Random, max_characters: int) -> str:
    """Whole lines from a random place of a random module, at most `max_characters` long and never empty."""
    while True:
        lines = rng.choice(library_sources()).splitlines()
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
