"""What a problem is, and how one is made from a template and drawn fields."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

HELD_OUT_ONE_IN = 20

NAMES = (
    ("Tom", "He"), ("Anna", "She"), ("Ben", "He"), ("Clara", "She"), ("David", "He"), ("Emma", "She"),
    ("Frank", "He"), ("Grace", "She"), ("Henry", "He"), ("Julia", "She"), ("Leo", "He"), ("Mia", "She"),
    ("Noah", "He"), ("Olga", "She"), ("Paul", "He"), ("Rosa", "She"), ("Sam", "He"), ("Tina", "She"),
)  # fmt: skip
THINGS = (
    "apples", "books", "cards", "coins", "cookies", "eggs", "flowers", "marbles", "oranges", "pencils", "shells",
    "stamps", "stones", "tickets", "toys",
)  # fmt: skip
CONTAINERS = ("bags", "boxes", "baskets", "jars", "drawers")

Key = tuple[int | str, ...]
Fields = Mapping[str, object]
Drawn = tuple[Key, Fields]


@dataclass(frozen=True)
class Problem:
    """A question, the worked answer as it stands in the training text, and the short result the checker looks for.

    ``key`` has everything that the answer depends on; names and things that dress a problem up are not in it.
    """

    family: str
    template: int
    key: Key
    question: str
    answer: str
    result: str

    @property
    def prompt(self) -> str:
        """The text a model gets; it ends where the answer starts."""
        return f"Question: {self.question}\nAnswer:"

    @property
    def held_out(self) -> bool:
        """Whether the problem lies outside the training data: one in HELD_OUT_ONE_IN, the same on every machine."""
        digest = hashlib.sha256(repr((self.family, self.template, self.key)).encode()).digest()
        return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


@dataclass(frozen=True)
class Template:
    """Format strings over the fields that the family's draw function returns (and over names and things).

    The answer is ``working``, then "The answer is ``result``."; with ``bare`` it is the result alone.
    """

    question: str
    working: str
    result: str
    bare: bool = False

    def render(self, family: str, index: int, key: Key, fields: Fields) -> Problem:
        """The problem that the fields make."""
        result, working = self.result.format(**fields), self.working.format(**fields)
        answer = result if self.bare else f"{working} The answer is {result}.".lstrip()
        return Problem(family, index, key, self.question.format(**fields), f" {answer}", result)


@dataclass(frozen=True)
class Family:
    """One kind of problem: how to draw its key and fields, and the ways to say it."""

    draw: Callable[[random.Random], Drawn]
    templates: tuple[Template, ...]

    def draw_problem(self, rng: random.Random, name: str) -> Problem:
        """A problem from whichever side of the split."""
        key, fields = self.draw(rng)
        index = rng.randrange(len(self.templates))
        return self.templates[index].render(name, index, key, {**_scenery(rng), **fields})


def _scenery(rng: random.Random) -> Fields:
    (name, pronoun), (friend, _) = rng.sample(NAMES, 2)
    return {
        "name": name,
        "He": pronoun,
        "he": pronoun.lower(),
        "friend": friend,
        "things": rng.choice(THINGS),
        "containers": rng.choice(CONTAINERS),
    }


def listed(items: Iterable[object]) -> str:
    """Items with commas."""
    return ", ".join(map(str, items))
