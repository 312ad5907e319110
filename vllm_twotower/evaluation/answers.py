"""Held-out problems, and how fast an engine answers them."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm_twotower.offline import generate
from vllm_twotower.progress import progress_bar
from vllm_twotower.training.problems import FAMILIES, Problem, draw_held_out_problems

if TYPE_CHECKING:
    from vllm import LLM


def held_out_problems(count: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """``count`` problems to choose settings on, and ``count`` others to report; all families alike, none trained on."""
    drawn = draw_held_out_problems(random.Random(f"{seed}/evaluation"), dict.fromkeys(FAMILIES, 1.0), 2 * count)
    return drawn[:count], drawn[count:]


def speeds(
    llm: LLM, problems: Sequence[Problem], max_tokens: int, variants: Mapping[str, Mapping[str, Any]], rounds: int
) -> dict[str, float]:
    """Tokens/s of each variant with one request open, the median of rounds in which they take turns."""
    rates: dict[str, list[float]] = {name: [] for name in variants}
    with progress_bar("speed", (rounds + 1) * len(variants) * len(problems), "answers") as bar:
        for _ in range(rounds + 1):
            for name, options in variants.items():
                answers = []
                for problem in problems:
                    answers.append(generate(llm, [problem.prompt], max_tokens, dict(options)))
                    bar.update()
                rates[name].append(sum(one.tokens for one in answers) / sum(one.seconds for one in answers))
    return {name: statistics.median(of_variant[1:]) for name, of_variant in rates.items()}  # the first warms up
