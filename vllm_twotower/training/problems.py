"""Templated problems with worked answers, and the checker that marks a model's text right or wrong.

Every problem belongs to a family and was made from one of its templates and a key (numbers or words). The split into
training and held-out problems is a hash of (family, template, key), so no held-out problem ever occurs in training,
whatever names and things it is dressed in.
"""

import hashlib
import random
import re
from collections.abc import Callable, Mapping
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
WORDS = (
    "red", "blue", "green", "black", "white", "cat", "dog", "bird", "fish", "horse", "sun", "moon", "star", "rain",
    "snow", "tree", "leaf", "river", "stone", "house", "door", "chair", "table", "bread", "milk",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Austria": "Vienna",
    "Poland": "Warsaw", "Greece": "Athens", "Norway": "Oslo", "Sweden": "Stockholm", "Japan": "Tokyo",
    "China": "Beijing", "Egypt": "Cairo", "Kenya": "Nairobi", "Peru": "Lima", "Cuba": "Havana", "Canada": "Ottawa",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "old": "young", "long": "short", "high": "low", "early": "late",
    "open": "closed", "full": "empty", "light": "dark", "hard": "soft", "wet": "dry", "rich": "poor", "near": "far",
}  # fmt: skip
YOUNG_ANIMALS = {
    "dog": "puppy", "cat": "kitten", "cow": "calf", "horse": "foal", "sheep": "lamb", "goat": "kid", "pig": "piglet",
    "hen": "chick", "duck": "duckling", "bear": "cub", "frog": "tadpole", "goose": "gosling",
}  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """A question, the worked answer as it stands in the training text, and the short result the checker looks for."""

    family: str
    template: int
    key: tuple[int | str, ...]
    question: str
    answer: str
    result: str

    @property
    def prompt(self) -> str:
        """The text a model gets; it ends where the answer starts."""
        return f"Question: {self.question}\nAnswer:"

    @property
    def held_out(self) -> bool:
        """Whether the hash of (family, template, key) puts the problem outside the training data."""
        return is_held_out(self.family, self.template, self.key)


Fields = dict[str, int | str]
Drawn = tuple[tuple[int | str, ...], Fields]


@dataclass(frozen=True)
class Template:
    """Format strings over the fields that the family's draw function returns (and over names and things)."""

    question: str
    working: str
    result: str


@dataclass(frozen=True)
class Family:
    """One kind of problem: how to draw its key and fields, and the ways to say it."""

    draw: Callable[[random.Random], Drawn]
    templates: tuple[Template, ...]


def is_held_out(family: str, template: int, key: tuple[int | str, ...]) -> bool:
    """True for one problem in HELD_OUT_ONE_IN, by a hash that is the same on every machine."""
    digest = hashlib.sha256(repr((family, template, key)).encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


def draw_problem(rng: random.Random, family: str) -> Problem:
    """A problem of the family (a key of FAMILIES), from whichever side of the split."""
    kind = FAMILIES[family]
    key, fields = kind.draw(rng)
    template = rng.randrange(len(kind.templates))
    return _render(family, template, key, {**_draw_scenery(rng), **fields})


def draw_training_problem(rng: random.Random, mix: Mapping[str, float]) -> Problem:
    """A problem that is not held out, of a family drawn in proportion to its weight in `mix`."""
    while True:
        problem = _draw_mixed(rng, mix)
        if not problem.held_out:
            return problem


def draw_held_out_problems(rng: random.Random, mix: Mapping[str, float], count: int) -> list[Problem]:
    """Up to `count` held-out problems with different questions (fewer only when the families are that small)."""
    by_question: dict[str, Problem] = {}
    for _ in range(10 * HELD_OUT_ONE_IN * count):
        problem = _draw_mixed(rng, mix)
        if problem.held_out:
            by_question.setdefault(problem.question, problem)
        if len(by_question) == count:
            break
    return list(by_question.values())


def _draw_mixed(rng: random.Random, mix: Mapping[str, float]) -> Problem:
    return draw_problem(rng, rng.choices(list(mix), weights=list(mix.values()))[0])


def stated_result(text: str) -> str | None:
    """What a model's text names as its answer: the words of the first "The answer is ....", or None.

    A result without its full stop does not count: the text may have been cut within a number.
    """
    match = re.search(r"The answer is (.*?)\.(?:\s|<|$)", text, flags=re.DOTALL)
    return match.group(1).strip() if match else None


def is_right(text: str, problem: Problem) -> bool:
    """Marks `text`, a continuation of the problem's prompt: right when the result it states is the expected one."""
    return stated_result(text) == problem.result


def _render(family: str, template: int, key: tuple[int | str, ...], fields: Fields) -> Problem:
    parts = FAMILIES[family].templates[template]
    result = parts.result.format(**fields)
    working = parts.working.format(**fields)
    answer = f" {working} The answer is {result}." if working else f" The answer is {result}."
    return Problem(family, template, key, parts.question.format(**fields), answer, result)


def _draw_scenery(rng: random.Random) -> Fields:
    (name, pronoun), (friend, _) = rng.sample(NAMES, 2)
    return {
        "name": name,
        "He": pronoun,
        "he": pronoun.lower(),
        "friend": friend,
        "things": rng.choice(THINGS),
        "containers": rng.choice(CONTAINERS),
    }


def _addition(rng: random.Random) -> Drawn:
    a, b = rng.randint(2, 60), rng.randint(2, 60)
    return (a, b), {"a": a, "b": b, "c": a + b}


def _subtraction(rng: random.Random) -> Drawn:
    a = rng.randint(4, 99)
    b = rng.randint(2, a - 1)
    return (a, b), {"a": a, "b": b, "c": a - b}


def _multiplication(rng: random.Random) -> Drawn:
    a, b = rng.randint(2, 9), rng.randint(2, 12)
    return (a, b), {"a": a, "b": b, "c": a * b}


def _add_then_subtract(rng: random.Random) -> Drawn:
    a, b = rng.randint(2, 40), rng.randint(2, 40)
    c = rng.randint(2, a + b - 1)
    return (a, b, c), {"a": a, "b": b, "c": c, "d": a + b, "e": a + b - c}


def _multiply_then_add(rng: random.Random) -> Drawn:
    a, b, c = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 18)
    return (a, b, c), {"a": a, "b": b, "c": c, "d": a * b, "e": a * b + c}


def _comparison(rng: random.Random) -> Drawn:
    a, b = rng.sample(range(2, 100), 2)
    (name, _), (friend, _) = rng.sample(NAMES, 2)
    fields = {"a": a, "b": b, "name": name, "friend": friend, "more": max(a, b), "less": min(a, b), "c": abs(a - b)}
    fields["richer"], fields["poorer"] = (name, friend) if a > b else (friend, name)
    return (a, b), fields


def _in_a_cycle(names: tuple[str, ...], longest: int) -> Callable[[random.Random], Drawn]:
    def draw(rng: random.Random) -> Drawn:
        start, steps = rng.randrange(len(names)), rng.randint(2, longest)
        path = [names[(start + i) % len(names)] for i in range(steps + 1)]
        fields = {"first": path[0], "next": path[1], "n": steps, "last": path[-1], "path": ", ".join(path)}
        return (path[0], steps), {**fields, "steps": ", ".join(path[1:])}

    return draw


def _number_list(rng: random.Random) -> Drawn:
    numbers = rng.sample(range(1, 60), rng.randint(3, 4))
    fields = {"items": numbers, "rising": sorted(numbers), "falling": sorted(numbers, reverse=True)}
    fields = {key: ", ".join(map(str, value)) for key, value in fields.items()}
    return tuple(numbers), {**fields, "largest": max(numbers), "smallest": min(numbers)}


def _word_list(rng: random.Random) -> Drawn:
    words = rng.sample(WORDS, rng.randint(3, 5))
    fields = {"items": ", ".join(words), "reversed": ", ".join(reversed(words)), "n": len(words)}
    return tuple(words), {**fields, "first": words[0], "last": words[-1]}


def _counting(rng: random.Random) -> Drawn:
    a = rng.randint(1, 90)
    b = a + rng.randint(3, 6)
    return (a, b), {"a": a, "b": b, "up": _counted(range(a, b + 1)), "down": _counted(range(b, a - 1, -1))}


def _counted(numbers: range) -> str:
    return ", ".join(map(str, numbers))


def _pair_of(table: dict[str, str]) -> Callable[[random.Random], Drawn]:
    def draw(rng: random.Random) -> Drawn:
        known = rng.choice(list(table))
        return (known,), {"known": known, "asked": table[known]}

    return draw


FAMILIES: dict[str, Family] = {
    "addition": Family(
        _addition,
        (
            Template("{name} has {a} {things} and buys {b} more. How many {things} does {he} have?",
                     "{a} + {b} = {c}. {He} has {c} {things}.", "{c}"),
            Template("{name} has {a} {things}. {friend} gives {name} {b} {things}. How many {things} does {name} have?",
                     "{a} + {b} = {c}. {name} has {c} {things}.", "{c}"),
            Template("There are {a} {things} on the table and {b} on the floor. How many {things} are there?",
                     "{a} + {b} = {c}. There are {c} {things}.", "{c}"),
            Template("What is {a} + {b}?", "{a} + {b} = {c}.", "{c}"),
        ),
    ),
    "subtraction": Family(
        _subtraction,
        (
            Template("{name} has {a} {things} and gives {b} to {friend}. How many {things} are left?",
                     "{a} - {b} = {c}. {He} has {c} {things} left.", "{c}"),
            Template("There are {a} {things} in a box. {name} takes {b} of them. How many {things} are left?",
                     "{a} - {b} = {c}. There are {c} {things} left.", "{c}"),
            Template("{name} needs {a} {things} and has {b}. How many more {things} does {he} need?",
                     "{a} - {b} = {c}. {He} needs {c} more {things}.", "{c}"),
            Template("What is {a} - {b}?", "{a} - {b} = {c}.", "{c}"),
        ),
    ),
    "multiplication": Family(
        _multiplication,
        (
            Template("There are {a} {containers} with {b} {things} each. How many {things} are there?",
                     "{a} * {b} = {c}. There are {c} {things}.", "{c}"),
            Template("{name} buys {b} {things} every day. How many {things} does {he} have after {a} days?",
                     "{a} * {b} = {c}. {He} has {c} {things}.", "{c}"),
            Template("What is {a} * {b}?", "{a} * {b} = {c}.", "{c}"),
        ),
    ),
    "add_then_subtract": Family(
        _add_then_subtract,
        (
            Template("{name} has {a} {things}, buys {b} more and gives {c} to {friend}. How many {things} are left?",
                     "{a} + {b} = {d}. {d} - {c} = {e}. {He} has {e} {things} left.", "{e}"),
            Template("{name} has {a} {things} and {friend} has {b}. They sell {c} of them. How many {things} are left?",
                     "{a} + {b} = {d}. {d} - {c} = {e}. There are {e} {things} left.", "{e}"),
        ),
    ),
    "multiply_then_add": Family(
        _multiply_then_add,
        (
            Template("{name} has {a} {containers} with {b} {things} each and finds {c} more. "
                     "How many {things} does {he} have?",
                     "{a} * {b} = {d}. {d} + {c} = {e}. {He} has {e} {things}.", "{e}"),
            Template("There are {c} {things} on the table and {a} {containers} with {b} {things} each. "
                     "How many {things} are there?",
                     "{a} * {b} = {d}. {d} + {c} = {e}. There are {e} {things}.", "{e}"),
        ),
    ),
    "comparison": Family(
        _comparison,
        (
            Template("{name} has {a} {things} and {friend} has {b}. Who has more?",
                     "{more} is more than {less}.", "{richer}"),
            Template("{name} has {a} {things} and {friend} has {b}. Who has fewer?",
                     "{less} is less than {more}.", "{poorer}"),
            Template("Which number is larger, {a} or {b}?", "{more} is more than {less}.", "{more}"),
        ),
    ),
    "weekdays": Family(
        _in_a_cycle(DAYS, longest=5),
        (
            Template("Which day comes {n} days after {first}?", "After {first} come {steps}.", "{last}"),
            Template("Today is {first}. Which day is it in {n} days?", "After {first} come {steps}.", "{last}"),
            Template("Name the days from {first} to {last}.", "", "{path}"),
        ),
    ),
    "months": Family(
        _in_a_cycle(MONTHS, longest=5),
        (
            Template("Which month comes {n} months after {first}?", "After {first} come {steps}.", "{last}"),
            Template("Name the months from {first} to {last}.", "", "{path}"),
        ),
    ),
    "sorting": Family(
        _number_list,
        (
            Template("Sort these numbers: {items}.", "", "{rising}"),
            Template("Which of these numbers is the largest: {items}?", "", "{largest}"),
            Template("Which of these numbers is the smallest: {items}?", "", "{smallest}"),
        ),
    ),
    "word_lists": Family(
        _word_list,
        (
            Template("Repeat this list: {items}.", "", "{items}"),
            Template("Reverse this list: {items}.", "", "{reversed}"),
            Template("How many words are in this list: {items}?", "", "{n}"),
            Template("What is the first word of this list: {items}?", "", "{first}"),
            Template("What is the last word of this list: {items}?", "", "{last}"),
        ),
    ),
    "counting": Family(
        _counting,
        (
            Template("Count from {a} to {b}.", "", "{up}"),
            Template("Count down from {b} to {a}.", "", "{down}"),
        ),
    ),
    "capitals": Family(
        _pair_of(CAPITALS),
        (
            Template("What is the capital of {known}?", "{asked} is the capital of {known}.", "{asked}"),
            Template("Which city is the capital of {known}?", "{asked} is the capital of {known}.", "{asked}"),
            Template("{asked} is the capital of which country?", "{asked} is the capital of {known}.", "{known}"),
        ),
    ),
    "opposites": Family(
        _pair_of(OPPOSITES),
        (
            Template("What is the opposite of {known}?", "The opposite of {known} is {asked}.", "{asked}"),
            Template("Which word means the opposite of {known}?", "The opposite of {known} is {asked}.", "{asked}"),
            Template("What is the opposite of {asked}?", "The opposite of {asked} is {known}.", "{known}"),
        ),
    ),
    "young_animals": Family(
        _pair_of(YOUNG_ANIMALS),
        (
            Template("What is a young {known} called?", "A young {known} is called a {asked}.", "{asked}"),
            Template("What do we call a young {known}?", "A young {known} is called a {asked}.", "{asked}"),
            Template("Which animal is a {asked} when it is young?", "A young {known} is called a {asked}.", "{known}"),
        ),
    ),
}  # fmt: skip
