"""Values of command-line arguments, each checked with one clear error."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from math import inf
from typing import Any


def positive(kind: type, what: str) -> Callable[[str], Any]:
    """Parses a finite number of some kind above 0; ``what`` says it in words."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < inf:
            raise argparse.ArgumentTypeError(f"{text!r} is no {what} above 0")
        return value

    return parse


whole_number, number = positive(int, "whole number"), positive(float, "number")


def probability(text: str) -> float:
    """Parses a number above 0 and at most 1."""
    value = number(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is more than 1")
    return value
