"""Real vLLM engines inside the test process, and a record of every denoising step they make."""

from __future__ import annotations

import gc
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from golden_data import DiffusionRun

# An engine in this process can be looked into.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from vllm import LLM, RequestOutput, SamplingParams  # noqa: E402

from vllm_twotower.engine import fill, pass_decision  # noqa: E402
from vllm_twotower.engine.decision import Decision  # noqa: E402

DEFAULTS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 1024,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 256,
    "kv_cache_memory_bytes": 64 << 20,
}


@contextmanager
def running_engine(model: Path, twotower: dict[str, Any] | None = None, **options: Any) -> Iterator[LLM]:
    """An engine on ``model``; ``options`` override ``DEFAULTS``, ``twotower`` goes to its additional config."""
    with _garbage_from_here_on():
        llm = LLM(model=str(model), **{**DEFAULTS, "additional_config": {"twotower": twotower or {}}, **options})
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()


@contextmanager
def _garbage_from_here_on() -> Iterator[None]:
    """vLLM collects garbage ten times in an engine's life: not among all that was imported before, but the engine's."""
    gc.freeze()
    try:
        with mock.patch.object(gc, "freeze"), mock.patch.object(gc, "unfreeze"):
            yield
    finally:
        gc.unfreeze()


def core(llm: LLM) -> Any:
    """The engine core of an in-process engine."""
    return llm.llm_engine.engine_core.engine_core


def runner(llm: LLM) -> Any:
    """Its model runner."""
    return core(llm).model_executor.driver_worker.worker.model_runner


def generate(
    llm: LLM, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], **options: Any
) -> list[RequestOutput]:
    """All requests at once; ``options`` go to ``LLM.generate``."""
    core_of = core(llm)
    assert not getattr(core_of, "is_broken", False), "an earlier step of this engine raised"
    try:
        return llm.generate([{"prompt_token_ids": list(p)} for p in prompts], list(params), use_tqdm=False, **options)
    except Exception:
        # A request that is refused leaves nothing behind; after any other error the engine would never come to rest.
        core_of.is_broken = core_of.scheduler.has_unfinished_requests()
        raise


def tokens_of(outputs: Sequence[RequestOutput]) -> list[tuple[int, ...]]:
    return [tuple(output.outputs[0].token_ids) for output in outputs]


def run_all(llm: LLM, runs: Sequence[DiffusionRun]) -> list[tuple[int, ...]]:
    """The tokens of golden runs, submitted all at once."""
    return tokens_of(generate(llm, [run.prompt for run in runs], [run.params() for run in runs]))


def assert_idle(llm: LLM) -> None:
    """Nothing is left of finished requests: no page, no slot, no row of the scheduler, no log-probabilities."""
    scheduler, worker = core(llm).scheduler, runner(llm)
    assert not scheduler.has_unfinished_requests()
    core(llm).step()  # in which the worker hears of the last ones that ended
    assert scheduler.kv_cache_manager.usage == 0
    assert not scheduler.requests
    assert not scheduler._known
    assert not scheduler._held_scores
    assert len(worker.req_states.free_indices) == worker.max_num_reqs
    assert not worker.prompt_logprobs_worker.in_progress_prompt_logprobs
    assert not worker.prompt_logprobs_worker.token_id_scores


@dataclass
class Step:
    """One denoising step of one request, as the engine made it."""

    t: float
    canvas_in: tuple[int, ...]
    canvas_out: tuple[int, ...]
    logits: torch.Tensor


@dataclass
class Trace:
    """Denoising steps by request id, in order; ``partial`` counts canvases that were scheduled but not whole."""

    steps: dict[str, list[Step]] = field(default_factory=lambda: defaultdict(list))
    partial: int = 0

    def of(self, output: RequestOutput) -> list[Step]:
        """The steps of a request; vLLM appends to the ids it gives requests inside the engine."""
        found = [steps for name, steps in self.steps.items() if name.split("-")[0] == output.request_id]
        assert len(found) == 1
        return found[0]


@contextmanager
def traced(llm: LLM) -> Iterator[Trace]:
    """Records every denoising step while the block runs."""
    trace, req_states = Trace(), runner(llm).req_states
    from_logits, fill_canvases, run = Decision._from_logits, pass_decision.fill_canvases, fill.StepFill.run
    raw = torch.empty(0)

    def keep(self, targets, logits, needs):
        nonlocal raw
        raw = logits.clone()
        return from_logits(self, targets, logits, needs)

    def record(part, *args):
        times, lengths, width = part.times.tolist(), part.rows.lengths.tolist(), part.rows.width
        filled = fill_canvases(part, *args)
        for i, (slot, length) in enumerate(zip(part.host_slots, lengths, strict=True)):
            canvases = (tuple(canvas[i, :length].tolist()) for canvas in (part.canvas, filled.canvas))
            step = Step(times[i], *canvases, raw[i * width : i * width + length])
            trace.steps[req_states.index_to_req_id[slot]].append(step)
        return filled

    def count(self, *args):
        trace.partial += int((self._rows.waits & ~self._rows.is_chunk).sum())
        run(self, *args)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Decision, "_from_logits", keep)
        monkeypatch.setattr(pass_decision, "fill_canvases", record)
        monkeypatch.setattr(fill.StepFill, "run", count)
        yield trace
