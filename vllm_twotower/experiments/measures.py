"""What the answers of a run say: quality, passes, the order of unmasking, agreement with autoregression."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from scipy.stats import kendalltau

from .store import Answer
from .tasks import Task


@dataclass(frozen=True)
class Result:
    """One way of generating on a list of problems.

    ``passes`` are those of the denoiser, for AR of the context tower, for verified drafts of both.
    ``passes_per_block`` counts blocks by the passes they took. ``unmasking[n - 1][i]`` tokens at place i of their block
    were decided in pass n. ``tau`` is the mean over ``ordered_blocks`` of :func:`order_of_unmasking`. Of ``drafts``
    verified drafts ``accepted`` tokens stayed; of the drafts whose places before i all agreed, and whose text goes on
    there, ``agreement[i]`` has how many agreed at i too, and how many there are.
    """

    problems: int
    right: int
    tokens: int
    passes: int
    right_by_family: dict[str, list[int]]
    passes_per_block: dict[int, int]
    unmasking: list[list[int]]
    tau: float | None
    ordered_blocks: int
    drafts: int
    accepted: int
    agreement: list[list[int]]

    @property
    def accuracy(self) -> float:
        return self.right / self.problems

    @property
    def tokens_per_pass(self) -> float:
        return self.tokens / self.passes

    @property
    def blocks(self) -> int:
        return sum(self.passes_per_block.values())

    @property
    def mean_passes_per_block(self) -> float:
        """0 without blocks."""
        return sum(n * count for n, count in self.passes_per_block.items()) / max(1, self.blocks)

    @property
    def accepted_per_draft(self) -> float:
        """0 without drafts."""
        return self.accepted / max(1, self.drafts)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Result:
        """From the fields as JSON has them."""
        blocks = {int(passes): count for passes, count in found["passes_per_block"].items()}
        return cls(**{**found, "passes_per_block": blocks})


def order_of_unmasking(decided_in: Sequence[int]) -> float | None:
    """Kendall's tau-b of a token's place in its block and the pass it was decided in; None if all were in one pass.

    1: from left to right, -1: from right to left. Passes are tied, places are not (Kendall, The treatment of ties in
    ranking problems, Biometrika 33, 1945).
    """
    if len(set(decided_in)) < 2:
        return None
    return float(kendalltau(range(len(decided_in)), decided_in).statistic)


def measure(tasks: Sequence[Task], answers: Sequence[Answer]) -> Result:
    """Of answers to all tasks, in their order."""
    right: Counter[str] = Counter()
    asked = Counter(task.family for task in tasks)
    passes_per_block: Counter[int] = Counter()
    unmasking: Counter[tuple[int, int]] = Counter()
    agreed: Counter[int] = Counter()
    tried: Counter[int] = Counter()
    taus: list[float] = []
    drafts = accepted = 0
    for task, answer in zip(tasks, answers, strict=True):
        right[task.family] += answer.right
        for block in answer.blocks:
            passes_per_block[block["passes"]] += 1
            if "drafted" in block:
                drafts, accepted = drafts + 1, accepted + block["accepted"]
                # The engine does not compare the token that ends a text.
                compared = block["accepted"] if block is answer.blocks[-1] else block["drafted"]
                agreed.update(range(min(block["accepted"], block["tokens"])))
                tried.update(range(min(compared, block["tokens"])))
            else:
                of_block = answer.decided_in[block["start"] : block["start"] + block["tokens"]]
                decided = [number for number in of_block if number is not None]  # in a block that is not verified, all
                unmasking.update(zip(decided, range(len(decided)), strict=True))
                if (tau := order_of_unmasking(decided)) is not None:
                    taus.append(tau)
    most, width = (max(found, default=-1) + 1 for found in ([n - 1 for n, _ in unmasking], [i for _, i in unmasking]))
    return Result(
        problems=len(tasks),
        right=right.total(),
        tokens=sum(len(answer.decided_in) for answer in answers),
        passes=sum(answer.passes for answer in answers),
        right_by_family={family: [right[family], asked[family]] for family in sorted(asked)},
        passes_per_block=dict(sorted(passes_per_block.items())),
        unmasking=[[unmasking[n + 1, i] for i in range(width)] for n in range(most)],
        tau=fmean(taus) if taus else None,
        ordered_blocks=len(taus),
        drafts=drafts,
        accepted=accepted,
        agreement=[[agreed[i], tried[i]] for i in range(len(tried))],
    )
