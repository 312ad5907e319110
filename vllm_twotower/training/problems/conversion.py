"""Units, clock times and dates."""

import random

from .base import Drawn, Family, Template

UNITS = (
    ("hours", "minutes", 60), ("minutes", "seconds", 60), ("weeks", "days", 7), ("days", "hours", 24),
    ("years", "months", 12), ("meters", "centimeters", 100), ("kilometers", "meters", 1000),
    ("kilograms", "grams", 1000), ("liters", "milliliters", 1000), ("euros", "cents", 100), ("feet", "inches", 12),
)  # fmt: skip
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
DAYS_OF = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


def _units(rng: random.Random) -> Drawn:
    large, small, factor = rng.choice(UNITS)
    a, b = rng.randint(2, 9), rng.randint(1, factor - 1)
    fields = {"large": large, "small": small, "a": a, "b": b, "factor": factor, "whole": a * factor}
    return (large, small, a, b), {**fields, "all": a * factor + b}


def _clock(rng: random.Random) -> Drawn:
    hour, minute, length = rng.randint(0, 22), rng.randint(0, 59), rng.randint(5, 59)
    total = minute + length
    end = f"{hour + total // 60}:{total % 60:02}"
    over = f" {total} - 60 = {total - 60}." if total >= 60 else ""
    working = f"{minute} + {length} = {total}.{over}"
    fields = {"start": f"{hour}:{minute:02}", "length": length, "end": end, "working": working}
    return (hour, minute, length), fields


def _days_after(rng: random.Random) -> Drawn:
    month, days = rng.randrange(12), rng.randint(2, 28)
    day, longest = rng.randint(1, DAYS_OF[month]), DAYS_OF[month]
    total, following = day + days, (month + 1) % 12
    working, end = f"{day} + {days} = {total}.", f"{MONTHS[month]} {total}"
    if total > longest:
        working += f" {MONTHS[month]} has {longest} days. {total} - {longest} = {total - longest}."
        end = f"{MONTHS[following]} {total - longest}"
    return (month, day, days), {"start": f"{MONTHS[month]} {day}", "days": days, "end": end, "working": working}


def _weekdays(rng: random.Random) -> Drawn:
    month, known = rng.randrange(12), rng.randrange(7)
    day, days = rng.randint(1, 10), rng.randint(2, 18)
    weeks, rest = divmod(days, 7)
    path = ", ".join(DAYS[(known + i) % 7] for i in range(rest + 1))
    fields: dict[str, object] = {"start": f"{MONTHS[month]} {day}", "end": f"{MONTHS[month]} {day + days}"}
    fields |= {"day": day, "later": day + days, "days": days, "weeks": weeks, "rest": rest, "path": path}
    return (month, known, day, days), {**fields, "known": DAYS[known], "asked": DAYS[(known + rest) % 7]}


def _written_dates(rng: random.Random) -> Drawn:
    month, year = rng.randrange(12), rng.randint(1950, 2049)
    day = rng.randint(1, DAYS_OF[month])
    fields = {"iso": f"{year}-{month + 1:02}-{day:02}", "words": f"{MONTHS[month]} {day}, {year}"}
    return (year, month, day), {**fields, "points": f"{day}.{month + 1}.{year}"}


CONVERSION = {
    "units": Family(
        _units,
        (
            Template("How many {small} are {a} {large} and {b} {small}?",
                     "{a} * {factor} = {whole}. {whole} + {b} = {all}.", "{all} {small}"),
            Template("Write {all} {small} in {large} and {small}.",
                     "{a} * {factor} = {whole}. {all} - {whole} = {b}.", "{a} {large} and {b} {small}"),
        ),
    ),
    "clock": Family(
        _clock,
        (
            Template("A film starts at {start} and lasts {length} minutes. When does it end?",
                     "{working} It ends at {end}.", "{end}"),
            Template("What time is it {length} minutes after {start}?", "{working}", "{end}"),
        ),
    ),
    "days_after": Family(
        _days_after,
        (
            Template("Which date is {days} days after {start}?", "{working}", "{end}"),
            Template("{name} leaves on {start} and comes back after {days} days. On which date is that?",
                     "{working} {He} comes back on {end}.", "{end}"),
        ),
    ),
    "weekdays": Family(
        _weekdays,
        (
            Template("{start} is a {known}. Which weekday is {end}?",
                     "{later} - {day} = {days}. {days} = {weeks} * 7 + {rest}. {path}.", "{asked}"),
            Template("{name} meets {friend} on {known}, {start}, and again on {end}. Which weekday is that?",
                     "{later} - {day} = {days}. {days} = {weeks} * 7 + {rest}. {path}.", "{asked}"),
        ),
    ),
    "written_dates": Family(
        _written_dates,
        (
            Template("Write {words} as an ISO date.", "", "{iso}"),
            Template("Write {iso} in words.", "", "{words}"),
            Template("Write {points} in words.", "", "{words}"),
            Template("Write {words} as day, month and year with points.", "", "{points}"),
        ),
    ),
}  # fmt: skip
