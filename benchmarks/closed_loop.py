"""A load for an engine: so many requests are always open, and the next one starts when one ends."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads slow a tiny model down

from vllm_twotower.offline import fastest_dtype

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams

TINY = Path(__file__).parents[1] / "models" / "tiny-twotower"


@dataclass
class Stretch:
    """Output tokens and engine steps within some time; ``cpu_seconds`` are those of this process."""

    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def __sub__(self, earlier: Stretch) -> Stretch:
        return Stretch(*(getattr(self, name) - getattr(earlier, name) for name in vars(self)))

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclass
class Outcome:
    """What a closed loop gave: in all, and while as many requests as asked for were open.

    ``gaps`` are seconds between outputs of a request, ``firsts`` until its first one.
    """

    whole: Stretch
    steady: Stretch
    firsts: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    texts: dict[int, str] = field(default_factory=dict)


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


def closed_loop(llm: LLM, prompts: Sequence[str], num_open: int, params: SamplingParams, warm_up: int = 0) -> Outcome:
    """Answers all prompts, ``num_open`` of them at any time.

    The steady stretch begins when ``warm_up`` have been answered and ends when there is none left to open.
    """
    waiting, opened, texts = iter(enumerate(prompts)), {}, {}
    firsts: list[float] = []
    gaps: list[float] = []
    begin = (time.perf_counter(), time.process_time())
    now = Stretch()
    first, last = (None if warm_up else now), None

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
        outputs = llm.llm_engine.step()
        moment, is_full = time.perf_counter(), True
        for output in outputs:
            index, before, count = opened[output.request_id]
            num_tokens = len(output.outputs[0].token_ids)
            if num_tokens > count:
                (gaps if count else firsts).append(moment - before)
                opened[output.request_id] = (index, moment, num_tokens)
            now = replace(now, tokens=now.tokens + num_tokens - count)
            if output.finished:
                texts[index] = output.outputs[0].text
                del opened[output.request_id]
                is_full = open_next() and is_full
        now = replace(now, steps=now.steps + 1, seconds=moment - begin[0], cpu_seconds=time.process_time() - begin[1])
        if first is None and len(texts) >= warm_up:
            first = now
        if last is None and not is_full:
            last = now
    return Outcome(now, last - first, firsts, gaps, texts)


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
