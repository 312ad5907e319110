"""What vLLM makes of a model that is not ours, as JSON: python tests/plain_model.py CHECKPOINT."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from types import SimpleNamespace
from typing import Any

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_WORKER_MULTIPROC_METHOD": "fork",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

from vllm import LLM, EngineArgs, SamplingParams
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.platforms import current_platform
from vllm.platforms.cpu import CpuPlatform
from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams

from vllm_twotower.patches import WORKER_PATCHES
from vllm_twotower.patches.registry import locate

PROMPTS = [{"prompt_token_ids": [1, *range(5 * i + 10, 5 * i + 30)]} for i in range(3)]
OURS = {"diffusion_mode": "ar", "diffusion_max_steps": 0}


def resolved(checkpoint: str) -> dict[str, Any]:
    """The platform and the configuration of a server that is given nothing but the model."""
    attributes = {name: getattr(current_platform, name) for name in dir(CpuPlatform) if not name.startswith("__")}
    config = EngineArgs(model=checkpoint).create_engine_config()
    return {
        "platform": {name: repr(value) for name, value in attributes.items() if not callable(value)},
        "environment": {name: value for name, value in os.environ.items() if name.startswith(("VLLM_", "TORCH"))},
        "config": str(config),
        "cache": repr(config.cache_config),
        "executor": str(config.parallel_config.distributed_executor_backend),
        "worker": config.parallel_config.worker_cls,
        "scheduler": config.scheduler_config.get_scheduler_cls().__qualname__,
        "runner": config.use_v2_model_runner,
    }


def generated(checkpoint: str) -> dict[str, Any]:
    """Tokens of requests of several kinds, the classes of the engine, and its metrics."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    engine = {"kv_cache_memory_bytes": 64 << 20, "enforce_eager": True, "disable_log_stats": False}
    llm = LLM(checkpoint, dtype="float32", max_model_len=128, **engine)
    core = llm.llm_engine.engine_core.engine_core
    worker = core.model_executor.driver_worker.worker
    requests = {
        "greedy": {"temperature": 0, "logprobs": 2},
        "seeded": {"temperature": 1.0, "seed": 1, "top_k": 20},
        "options of ours": {"temperature": 0, "extra_args": OURS},
        "grammar": {"temperature": 0, "structured_outputs": StructuredOutputsParams(regex="[ab]{8}")},
    }
    tokens = {}
    for name, options in requests.items():
        outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=8, **options), use_tqdm=False)
        tokens[name] = [output.outputs[0].token_ids for output in outputs]
    beams = llm.beam_search(PROMPTS[:1], BeamSearchParams(beam_width=2, max_tokens=4))
    tokens["beams"] = [sequence.tokens for sequence in beams[0].sequences]
    return {
        "tokens": tokens,
        "classes": [type(part).__qualname__ for part in (core.scheduler, worker, worker.model_runner)],
        "metrics": sorted({metric.name for metric in llm.get_metrics()}),
        "beam search over HTTP": beam_search_is_refused(llm.model_config),
    }


def beam_search_is_refused(model_config: Any) -> str | None:
    """The error of a beam search with options of ours, None without."""
    serving = SimpleNamespace(model_config=model_config, request_logger=None, _is_model_supported=lambda name: True)
    request = SimpleNamespace(model="served", use_beam_search=True, vllm_xargs=OURS)
    try:
        return asyncio.run(BaseServing._check_model(serving, request))
    except ValueError as error:
        return str(error)


def replaced_in_workers() -> list[str]:
    """The patches for workers whose target is ours in this process."""
    targets = {patch.name: locate(patch.target) for patch in WORKER_PATCHES}
    found = {name: getattr(*target) for name, target in targets.items()}
    modules = {name: getattr(value, "__module__", None) or type(value).__module__ for name, value in found.items()}
    return [name for name, module in modules.items() if module.startswith("vllm_twotower")]


if __name__ == "__main__":
    result = resolved(sys.argv[1]) | generated(sys.argv[1]) | {"replaced": replaced_in_workers()}
    print(json.dumps(result))
