"""A load for an engine: so many requests are always open, and the next one starts when one ends."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads slow a tiny model down

from vllm_twotower.demo import fastest_dtype

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams

TINY = Path(__file__).parents[1] / "models" / "tiny-twotower"


@dataclass
class Outcome:
    """What a closed loop gave; ``all_tokens`` also those of the end, when fewer requests are open.

    ``gaps`` are seconds between outputs of a request, ``firsts`` until its first one.
    """

    tokens: int = 0
    seconds: float = 0.0
    all_tokens: int = 0
    firsts: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    texts: dict[int, str] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def start(model: Path, twotower: dict[str, Any] | None = None, **options: Any) -> LLM:
    """An engine in a process of its own, so that several can take turns."""
    from vllm import LLM

    settings = {"dtype": fastest_dtype(), "max_model_len": 2048, "kv_cache_memory_bytes": 256 << 20}
    return LLM(
        model=str(model),
        disable_log_stats=False,
        additional_config={"twotower": twotower or {}},
        **{**settings, **options},
    )


def problems(model: Path) -> list[dict[str, str]]:
    """The held-out problems beside the tiny model."""
    return [json.loads(line) for line in (model / "heldout.jsonl").read_text().splitlines()]


_names = itertools.count()


def closed_loop(llm: LLM, prompts: Sequence[str], num_open: int, params: SamplingParams) -> Outcome:
    """Answers all prompts, ``num_open`` of them at any time.

    Tokens and seconds are those of the time in which so many were open: without the end, when fewer and fewer are.
    """
    waiting, outcome = iter(enumerate(prompts)), Outcome()
    opened: dict[str, tuple[int, float, int]] = {}
    start_time = time.perf_counter()

    def open_next() -> bool:
        """Whether there was one."""
        for index, prompt in itertools.islice(waiting, 1):
            name = str(next(_names))
            llm.llm_engine.add_request(name, prompt, params)
            opened[name] = (index, time.perf_counter(), 0)
            return True
        return False

    for _ in range(num_open):
        open_next()
    while opened:
        for output in llm.llm_engine.step():
            now, completion = time.perf_counter(), output.outputs[0]
            index, last, count = opened[output.request_id]
            if len(completion.token_ids) > count:
                (outcome.gaps if count else outcome.firsts).append(now - last)
                if not outcome.seconds:
                    outcome.tokens += len(completion.token_ids) - count
                opened[output.request_id] = (index, now, len(completion.token_ids))
            if output.finished:
                outcome.all_tokens += len(completion.token_ids)
                outcome.texts[index] = completion.text
                del opened[output.request_id]
                if not open_next() and not outcome.seconds:
                    outcome.seconds = now - start_time
    return outcome


def metric_values(llm: LLM) -> dict[str, float]:
    """All counters and gauges of an engine; a histogram gives its count and sum."""
    values: dict[str, float] = {}
    for metric in llm.get_metrics():
        if hasattr(metric, "value"):
            values[metric.name] = metric.value
        elif hasattr(metric, "sum"):
            values |= {f"{metric.name}_sum": metric.sum, f"{metric.name}_count": metric.count}
    return values


def in_turns(names: Sequence[str], rounds: int) -> Iterator[str]:
    """Each name once a round, every second round in reverse order, so that a drift of the machine hits all alike."""
    for i in range(rounds):
        yield from names if i % 2 == 0 else reversed(names)
