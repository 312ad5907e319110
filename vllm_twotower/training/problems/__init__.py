"""Templated problems with worked answers, and the checker that marks a model's text right or wrong.

Every problem belongs to a family and was made from one of its templates and a key (numbers or words). The split into
training and held-out problems is a hash of (family, template, key), so no held-out problem ever occurs in training,
whatever names and things it is dressed in. Each family has thousands of keys and more, so that a model must learn what
to do: there are too many to remember.
"""

import json
import random
import re
from collections.abc import Mapping

from .arithmetic import ARITHMETIC
from .base import HELD_OUT_ONE_IN, Family, Problem
from .conversion import CONVERSION
from .records import RECORDS
from .sequences import SEQUENCES

__all__ = [
    "FAMILIES", "HELD_OUT_ONE_IN", "Problem", "draw_held_out_problems", "draw_problem", "draw_training_problem",
    "is_right", "stated_result",
]  # fmt: skip

FAMILIES: dict[str, Family] = ARITHMETIC | SEQUENCES | CONVERSION | RECORDS


def draw_problem(rng: random.Random, family: str) -> Problem:
    """A problem of the family (a key of FAMILIES), from whichever side of the split."""
    return FAMILIES[family].draw_problem(rng, family)


def draw_training_problem(rng: random.Random, mix: Mapping[str, float]) -> Problem:
    """A problem that is not held out, of a family drawn in proportion to its weight in `mix`."""
    while True:
        problem = _draw_mixed(rng, mix)
        if not problem.held_out:
            return problem


def draw_held_out_problems(rng: random.Random, mix: Mapping[str, float], count: int) -> list[Problem]:
    """`count` held-out problems with different questions."""
    by_question: dict[str, Problem] = {}
    while len(by_question) < count:
        problem = _draw_mixed(rng, mix)
        if problem.held_out:
            by_question.setdefault(problem.question, problem)
    return list(by_question.values())


def _draw_mixed(rng: random.Random, mix: Mapping[str, float]) -> Problem:
    return draw_problem(rng, rng.choices(list(mix), weights=list(mix.values()))[0])


def stated_result(text: str) -> str | None:
    """What a model's text names as its answer, or None: a JSON object at its start, as ``json.dumps`` writes it, or the
    words of the first "The answer is ....".

    A result without its full stop does not count: the text may have been cut within a number.
    """
    if text.lstrip().startswith("{"):
        try:
            return json.dumps(json.JSONDecoder().raw_decode(text.lstrip())[0])
        except json.JSONDecodeError:
            return None
    match = re.search(r"The answer is (.*?)\.(?:\s|<|$)", text, flags=re.DOTALL)
    return match.group(1).strip() if match else None


def is_right(text: str, problem: Problem) -> bool:
    """Marks `text`, a continuation of the problem's prompt: right when the result it states is the expected one."""
    return stated_result(text) == problem.result
