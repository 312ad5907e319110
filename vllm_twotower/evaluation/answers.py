"""Answers of an engine to held-out problems, marked by family."""

from __future__ import annotations

import random
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_twotower.offline import generate
from vllm_twotower.planning.steps_per_block import METRIC
from vllm_twotower.training.problems import FAMILIES, Problem, draw_held_out_problems, is_right

if TYPE_CHECKING:
    from vllm import LLM

AR = {"diffusion_mode": "ar"}
VERIFIED = {"diffusion_mode": "verified"}


@dataclass(frozen=True)
class Score:
    """How one way of generating did on a list of problems, greedily.

    ``passes`` are those of the denoiser, for AR of the context tower, for verified drafts of both. ``steps_per_block``
    counts finished blocks by the passes they took, in the engine's buckets (upper bound -> blocks). Of each draft
    ``accepted`` tokens were right. ``identical`` texts are those of AR, where that was asked for.
    """

    problems: int
    right: int
    tokens: int
    passes: int
    right_by_family: dict[str, tuple[int, int]]
    steps_per_block: dict[str, int]
    accepted: float = 0.0
    identical: int | None = None

    @property
    def accuracy(self) -> float:
        return self.right / self.problems

    @property
    def tokens_per_pass(self) -> float:
        return self.tokens / self.passes


def held_out_problems(count: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """``count`` problems to choose settings on, and ``count`` others to report; all families alike, none trained on."""
    drawn = draw_held_out_problems(random.Random(f"{seed}/evaluation"), dict.fromkeys(FAMILIES, 1.0), 2 * count)
    return drawn[:count], drawn[count:]


def score(
    llm: LLM,
    problems: Sequence[Problem],
    max_tokens: int,
    options: Mapping[str, Any],
    texts: list[str] | None = None,
) -> Score:
    """Lets the engine answer all problems, many at a time, and marks the answers.

    ``texts`` are those that the answers are compared with; into an empty list they are put.
    """
    before, drafts_before = _steps_per_block(llm), _drafts(llm)
    answers = generate(llm, [problem.prompt for problem in problems], max_tokens, dict(options))
    right: Counter[str] = Counter()
    for problem, text in zip(problems, answers.texts, strict=True):
        right[problem.family] += is_right(text, problem)
    asked = Counter(problem.family for problem in problems)
    cumulative = _steps_per_block(llm) - before
    blocks, below = {}, 0
    for bound, count in cumulative.items():
        blocks[bound], below = count - below, count
    num_drafts, num_accepted = (after - one for after, one in zip(_drafts(llm), drafts_before, strict=True))
    identical = sum(map(str.__eq__, texts, answers.texts)) if texts else None
    if texts is not None and not texts:
        texts += answers.texts
    return Score(
        len(problems),
        right.total(),
        answers.tokens,
        answers.passes,
        {family: (right[family], asked[family]) for family in sorted(asked)},
        {bound: count for bound, count in blocks.items() if count},
        num_accepted / num_drafts if num_drafts else 0.0,
        identical,
    )


def _steps_per_block(llm: LLM) -> Counter[str]:
    """Blocks that took at most so many passes, by bound."""
    found: Counter[str] = Counter()
    for metric in llm.get_metrics():
        if metric.name == METRIC:
            found.update(metric.buckets)
    return found


def _drafts(llm: LLM) -> tuple[int, int]:
    """Drafts that were verified so far, and the tokens of them that were accepted."""
    from vllm_twotower.engine.metrics import ACCEPTED_PER_DRAFT

    found = [metric for metric in llm.get_metrics() if metric.name == ACCEPTED_PER_DRAFT]
    return sum(metric.count for metric in found), sum(metric.sum for metric in found)


def speeds(
    llm: LLM, problems: Sequence[Problem], max_tokens: int, variants: Mapping[str, Mapping[str, Any]], rounds: int
) -> dict[str, float]:
    """Tokens/s of each variant with one request open, the median of rounds in which they take turns."""
    rates: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, options in variants.items():
            answers = [generate(llm, [problem.prompt], max_tokens, dict(options)) for problem in problems]
            rates[name].append(sum(one.tokens for one in answers) / sum(one.seconds for one in answers))
    return {name: statistics.median(of_variant[1:]) for name, of_variant in rates.items()}  # the first warms up
