"""What an experiment asks: held-out problems, or the prompts and answers of a file."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_twotower.training.problems import FAMILIES, Problem, draw_held_out_problems, stated_result


@dataclass(frozen=True)
class Task:
    """A prompt, the right answer to it, and what kind of problem it is."""

    prompt: str
    answer: str
    family: str = ""

    @classmethod
    def of(cls, problem: Problem) -> Task:
        """A templated problem."""
        return cls(problem.prompt, problem.answer, problem.family)

    def is_right(self, text: str) -> bool:
        """Whether a text states the result that the answer states, or is the answer where that states none."""
        result = stated_result(self.answer)
        return text.strip() == self.answer.strip() if result is None else stated_result(text) == result


def held_out_tasks(count: int, seed: int, families: Sequence[str] = ()) -> list[Task]:
    """Problems that no training has seen, of all families alike or of those that are named."""
    mix = dict.fromkeys(families or FAMILIES, 1.0)
    return [Task.of(one) for one in draw_held_out_problems(random.Random(f"{seed}/evaluation"), mix, count)]


def read_tasks(path: Path) -> list[Task]:
    """From a file with a JSON object a line: ``prompt``, ``answer`` and, if it has one, ``family``.

    Raises ValueError for a line without them.
    """
    tasks = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        entry = json.loads(line)
        if not isinstance(entry, dict) or not all(isinstance(entry.get(name), str) for name in ("prompt", "answer")):
            raise ValueError(f"{path}, line {number}: needs the texts 'prompt' and 'answer'")
        tasks.append(Task(entry["prompt"], entry["answer"], entry.get("family", "")))
    return tasks
