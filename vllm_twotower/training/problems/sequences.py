"""Lists of numbers, words and letters, and expressions of Python over them."""

import random

from .base import Drawn, Family, Template, listed

WORDS = (
    "red", "blue", "green", "black", "white", "cat", "dog", "bird", "fish", "horse", "sun", "moon", "star", "rain",
    "snow", "tree", "leaf", "river", "stone", "house", "door", "chair", "table", "bread", "milk", "salt", "sugar",
    "wind", "cloud", "hill", "road", "bridge", "boat", "train", "car", "hat", "coat", "shoe", "king", "queen",
)  # fmt: skip
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")


def _numbers(rng: random.Random) -> Drawn:
    numbers = rng.sample(range(1, 100), rng.randint(3, 4))
    rising = sorted(numbers)
    fields = {"items": listed(numbers), "rising": listed(rising), "falling": listed(rising[::-1])}
    return tuple(numbers), {**fields, "largest": rising[-1], "smallest": rising[0]}


def _words(rng: random.Random) -> Drawn:
    words = rng.sample(WORDS, rng.randint(3, 6))
    place, gone = rng.randrange(len(words)), rng.choice(words)
    fields = {"items": listed(words), "reversed": listed(words[::-1]), "n": len(words), "last": words[-1]}
    fields |= {"place": ORDINALS[place], "there": words[place]}
    fields |= {"gone": gone, "left": listed(word for word in words if word != gone)}
    return (*words, place, gone), fields


def _letters(rng: random.Random) -> Drawn:
    letters = [rng.choice("abcdefgh") for _ in range(rng.randint(4, 6))]
    asked = rng.choice(letters)
    fields = {"items": " ".join(letters), "reversed": " ".join(letters[::-1]), "sorted": " ".join(sorted(letters))}
    fields |= {"joined": "-".join(letters), "upper": " ".join(letters).upper()}
    return (*letters, asked), {**fields, "asked": asked, "n": letters.count(asked)}


def _counting(rng: random.Random) -> Drawn:
    step, count = rng.randint(2, 9), rng.randint(4, 6)
    a = rng.randint(1, 99)
    numbers = range(a, a + step * count, step)
    fields = {"a": a, "b": numbers[-1], "step": step, "up": listed(numbers), "down": listed(numbers[::-1])}
    return (a, step, count), fields


def _expression(rng: random.Random) -> Drawn:
    numbers = [rng.randint(1, 30) for _ in range(rng.randint(3, 4))]
    other = [rng.randint(1, 30) for _ in range(2)]
    place = rng.randrange(len(numbers))
    fields = {"items": numbers, "other": other, "i": place, "there": numbers[place], "tail": numbers[place:]}
    fields |= {"all": numbers + other, "reversed": numbers[::-1], "sorted": sorted(numbers), "n": len(numbers)}
    return (*numbers, *other, place), {name: str(value) for name, value in fields.items()}


SEQUENCES = {
    "sorting": Family(
        _numbers,
        (
            Template("Sort these numbers: {items}.", "", "{rising}"),
            Template("Sort these numbers from large to small: {items}.", "", "{falling}"),
            Template("Which of these numbers is the largest: {items}?", "", "{largest}"),
            Template("Which of these numbers is the smallest: {items}?", "", "{smallest}"),
        ),
    ),
    "word_lists": Family(
        _words,
        (
            Template("Repeat this list: {items}.", "", "{items}"),
            Template("Reverse this list: {items}.", "", "{reversed}"),
            Template("How many words are in this list: {items}?", "", "{n}"),
            Template("What is the {place} word of this list: {items}?", "", "{there}"),
            Template("What is the last word of this list: {items}?", "", "{last}"),
            Template("Remove {gone} from this list: {items}.", "", "{left}"),
        ),
    ),
    "letters": Family(
        _letters,
        (
            Template("Reverse these letters: {items}.", "", "{reversed}"),
            Template("Sort these letters: {items}.", "", "{sorted}"),
            Template("Join these letters with hyphens: {items}.", "", "{joined}"),
            Template("Write these letters in upper case: {items}.", "", "{upper}"),
            Template("How often is {asked} among these letters: {items}?", "Sorted: {sorted}.", "{n}"),
        ),
    ),
    "counting": Family(
        _counting,
        (
            Template("Count from {a} to {b} in steps of {step}.", "", "{up}"),
            Template("Count down from {b} to {a} in steps of {step}.", "", "{down}"),
        ),
    ),
    "python_lists": Family(
        _expression,
        (
            Template("What is {items} + {other}?", "", "{all}"),
            Template("What is {items}[::-1]?", "", "{reversed}"),
            Template("What is {items}[{i}]?", "", "{there}"),
            Template("What is {items}[{i}:]?", "", "{tail}"),
            Template("What is sorted({items})?", "", "{sorted}"),
            Template("What is len({items})?", "", "{n}"),
        ),
    ),
}  # fmt: skip
