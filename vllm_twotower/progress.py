"""Progress of what takes long: what runs, how much is done and the time left."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 30


class _Lines:
    """Makes a line of its own of each refresh of a bar, where there is no terminal that could redraw it."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> None:
        if text := text.strip("\r\n "):
            self._stream.write(text + "\n")

    def flush(self) -> None:
        self._stream.flush()


def progress_bar(what: str, total: int | None, unit: str, initial: int = 0) -> tqdm:
    """A bar on stderr; without a terminal plain lines, one in half a minute. ``total``: None where nobody knows it."""
    options: dict[str, Any] = {"desc": what, "total": total, "initial": initial, "smoothing": 0}
    if sys.stderr.isatty():
        return tqdm(**options, unit=f" {unit}", mininterval=0.5)
    return tqdm(
        **options,
        unit=unit,
        file=_Lines(sys.stderr),
        mininterval=SECONDS_BETWEEN_LINES,
        maxinterval=SECONDS_BETWEEN_LINES,  # a line also where nothing is done meanwhile
        miniters=1 if total is None else max(1, min(16, total // 100)),  # so that the first line knows the time left
        bar_format="{desc}: {n_fmt} of {total_fmt} {unit}, {elapsed} gone, {remaining} left",
    )


def progress(items: Sequence[T], what: str, unit: str) -> Iterator[T]:
    """The items, with a bar that counts those that are done."""
    with progress_bar(what, len(items), unit) as bar:
        for item in items:
            yield item
            bar.update()
