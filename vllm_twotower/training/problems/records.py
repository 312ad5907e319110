"""Records: JSON from sentences, and values from JSON."""

import json
import random

from .base import NAMES, Drawn, Family, Template

CITIES = (
    "Paris", "Rome", "Madrid", "Berlin", "Vienna", "Warsaw", "Athens", "Oslo", "Stockholm", "Tokyo", "Beijing", "Cairo",
    "Nairobi", "Lima", "Havana", "Ottawa",
)  # fmt: skip
JOBS = (
    "baker", "doctor", "driver", "farmer", "lawyer", "nurse", "painter", "pilot", "singer", "teacher", "writer",
    "waiter",
)  # fmt: skip
SENTENCES = (
    "{name} is {age} years old, lives in {city} and works as a {job}.",
    "{name} from {city} is a {job} of {age} years.",
    "The {job} {name} is {age} and comes from {city}.",
    "In {city} lives {name}, a {job}, who is {age}.",
)


def _person(rng: random.Random) -> Drawn:
    fields = {
        "name": rng.choice(NAMES)[0],
        "age": rng.randint(18, 99),
        "city": rng.choice(CITIES),
        "job": rng.choice(JOBS),
    }
    wanted = rng.sample(list(fields), rng.randint(2, 4))
    sentence, asked = rng.choice(SENTENCES).format(**fields), rng.choice(wanted)
    record = {name: fields[name] for name in wanted}
    fields |= {"sentence": sentence, "record": json.dumps(record), "wanted": ", ".join(wanted), "asked": asked}
    return (sentence, *wanted, asked), {**fields, "value": record[asked]}


RECORDS = {
    "json_extraction": Family(
        _person,
        (
            Template("Extract {wanted} as JSON: {sentence}", "", "{record}", bare=True),
            Template("{sentence} Write a JSON object with {wanted}.", "", "{record}", bare=True),
        ),
    ),
    "json_lookup": Family(
        _person,
        (
            Template("What is the {asked} in {record}?", "", "{value}"),
            Template("Read this record: {record}. Which {asked} does it have?", "The {asked} is {value}.", "{value}"),
        ),
    ),
}  # fmt: skip
