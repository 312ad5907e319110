"""Offline generation with a TwoTower engine, its passes counted."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from vllm import LLM


@dataclass
class Answers:
    """Texts of some requests, their tokens, the tower passes that made them, and the seconds it took."""

    texts: list[str]
    tokens: int
    passes: int
    seconds: float


def fastest_dtype() -> str:
    """bf16 where the machine has instructions for it, else fp32; not every CPU has."""
    import torch

    if torch.cuda.is_available() or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported():
        return "bfloat16"
    return "float32"


def use_one_thread() -> None:
    """For small models, before torch is imported: they gain nothing from more threads, and lose where cores are shared.

    An engine's process can then be forked, which spares it vLLM's imports.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def small_engine_options(**options: Any) -> dict[str, Any]:
    """Arguments of vLLM's ``LLM`` for a small model, with statistics."""
    return {"dtype": fastest_dtype(), "max_model_len": 1024, "disable_log_stats": False, **options}


@contextmanager
def logged_to(log: Path) -> Iterator[TextIO]:
    """A stream to the standard output, while all else that this process and its children print goes to ``log``."""
    sys.stdout.flush()
    kept = [os.dup(stream) for stream in (1, 2)]
    try:
        with log.open("wb") as file, open(os.dup(kept[0]), "w", encoding=sys.stdout.encoding, buffering=1) as out:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
            yield out
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        for stream, before in zip((1, 2), kept, strict=True):
            os.dup2(before, stream)
            os.close(before)


@contextmanager
def small_engine(model: Path, **options: Any) -> Iterator[LLM]:
    """An engine for a small model, on one thread, that ends with the block."""
    use_one_thread()
    import torch

    if torch.get_num_threads() == 1:  # else OpenMP has threads, which a forked process lacks
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "fork")
    from vllm import LLM

    llm = LLM(model=str(model), **small_engine_options(**options))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()  # or vLLM warns that its process ended


def generate(llm: LLM, prompts: list[str], max_tokens: int, options: dict, ignore_eos: bool = False) -> Answers:
    """Answers to all prompts, submitted at once, greedily; the engine must keep statistics."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=ignore_eos, extra_args=options)
    mode = options.get("diffusion_mode")
    passes = tower_passes(llm, mode)
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    completions = [output.outputs[0] for output in outputs]
    return Answers(
        [completion.text for completion in completions],
        sum(len(completion.token_ids) for completion in completions),
        tower_passes(llm, mode) - passes,
        seconds,
    )


def tower_passes(llm: LLM, mode: str | None) -> int:
    """Passes of all requests so far that give tokens in a mode: of the denoiser, of the context tower, or of both."""
    context, denoiser = "vllm:twotower_num_context_passes", "vllm:diffusion_num_denoising_steps"
    names = {"ar": (context,), "verified": (context, denoiser)}.get(mode or "", (denoiser,))
    return sum(m.value for m in llm.get_metrics() if m.name in names)
