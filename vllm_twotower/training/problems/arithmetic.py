"""Word problems with worked steps."""

import random

from .base import NAMES, Drawn, Family, Template


def _addition(rng: random.Random) -> Drawn:
    a, b = rng.randint(2, 99), rng.randint(2, 99)
    return (a, b), {"a": a, "b": b, "c": a + b}


def _subtraction(rng: random.Random) -> Drawn:
    a = rng.randint(4, 150)
    b = rng.randint(2, a - 1)
    return (a, b), {"a": a, "b": b, "c": a - b}


def _add_then_subtract(rng: random.Random) -> Drawn:
    a, b = rng.randint(2, 99), rng.randint(2, 99)
    c = rng.randint(2, a + b - 1)
    return (a, b, c), {"a": a, "b": b, "c": c, "d": a + b, "e": a + b - c}


def _multiply_then_add(rng: random.Random) -> Drawn:
    a, b, c = rng.randint(2, 9), rng.randint(2, 12), rng.randint(2, 99)
    return (a, b, c), {"a": a, "b": b, "c": c, "d": a * b, "e": a * b + c}


def _shopping(rng: random.Random) -> Drawn:
    a, b, c, d = rng.randint(2, 9), rng.randint(2, 12), rng.randint(2, 9), rng.randint(2, 12)
    fields = {"a": a, "b": b, "c": c, "d": d, "e": a * b, "f": c * d, "g": a * b + c * d, "h": abs(a * b - c * d)}
    return (a, b, c, d), {**fields, "more": max(a * b, c * d), "less": min(a * b, c * d)}


def _comparison(rng: random.Random) -> Drawn:
    a, b = rng.sample(range(10, 100), 2)
    (name, _), (friend, _) = rng.sample(NAMES, 2)
    fields = {"a": a, "b": b, "name": name, "friend": friend, "more": max(a, b), "less": min(a, b), "c": abs(a - b)}
    fields["richer"], fields["poorer"] = (name, friend) if a > b else (friend, name)
    return (a, b), fields


ARITHMETIC = {
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
    "shopping": Family(
        _shopping,
        (
            Template("{name} buys {a} books for {b} euros each and {c} toys for {d} euros each. "
                     "How much does {he} pay?",
                     "{a} * {b} = {e}. {c} * {d} = {f}. {e} + {f} = {g}. {He} pays {g} euros.", "{g}"),
            Template("{name} has {a} {containers} with {b} {things} each and {friend} has {c} with {d} each. "
                     "How many {things} do they have?",
                     "{a} * {b} = {e}. {c} * {d} = {f}. {e} + {f} = {g}. They have {g} {things}.", "{g}"),
            Template("How far apart are {a} * {b} and {c} * {d}?",
                     "{a} * {b} = {e}. {c} * {d} = {f}. {more} - {less} = {h}.", "{h}"),
        ),
    ),
    "comparison": Family(
        _comparison,
        (
            Template("{name} has {a} {things} and {friend} has {b}. Who has more?",
                     "{more} is more than {less}. {richer} has {more} {things}.", "{richer}"),
            Template("{name} has {a} {things} and {friend} has {b}. Who has fewer?",
                     "{less} is less than {more}. {poorer} has {less} {things}.", "{poorer}"),
            Template("{name} has {a} {things} and {friend} has {b}. How many more does {richer} have?",
                     "{more} - {less} = {c}. {richer} has {c} more {things}.", "{c}"),
        ),
    ),
}  # fmt: skip
