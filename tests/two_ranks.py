"""Engines with two tensor-parallel ranks, in a process of their own: python two_ranks.py OUTPUT CHECKPOINT...

Writes, for each of the checkpoints, the tokens of its golden runs, of autoregression, of random requests, of the
trained model's problems, and what its ranks exchanged. ``C alone`` is the context tower of checkpoint C. A checkpoint
may be a folder: then the tokens of ``PROMPTS``.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import golden_data
from random_requests import RandomRequest, draw_request

if TYPE_CHECKING:
    from vllm import SamplingParams

ROOT = Path(__file__).parents[1]
TRAINED = ROOT / "models/tiny-twotower"
PROBLEMS = [json.loads(line)["prompt"] for line in (TRAINED / "heldout.jsonl").read_text().splitlines()[:12]]
PROMPTS = [list(range(4 + i, 30 + 2 * i)) for i in range(4)]
MODES = ("ar", "mask_diffusion", "verified")


def random_requests() -> list[RandomRequest]:
    rng = random.Random(3)
    return [draw_request(rng) for _ in range(24)]


def trained_params(mode: str) -> SamplingParams:
    """How the trained model's problems are asked."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=64, extra_args={"diffusion_mode": mode})


def count_exchanges(worker: Any) -> None:
    """Run in a worker: from now on notes what its ranks exchange."""
    from vllm.distributed.parallel_state import GroupCoordinator

    worker.exchanges = Counter()

    def counted(name: str, original: Any) -> Any:
        def call(group: Any, tensor: Any, *args: Any, **kwargs: Any) -> Any:
            worker.exchanges[f"{name} {tensor.shape[-1]}"] += tensor.numel() * tensor.element_size()
            return original(group, tensor, *args, **kwargs)

        return call

    for name in ("all_reduce", "all_gather", "gather", "broadcast", "reduce_scatter"):
        setattr(GroupCoordinator, name, counted(name, getattr(GroupCoordinator, name)))


def exchanged(worker: Any) -> dict[str, int]:
    """Run in a worker: bytes by kind of exchange and width of the tensor, since it was last asked."""
    found, worker.exchanges = dict(worker.exchanges), Counter()
    return found


def main(output: Path, checkpoints: list[str]) -> None:
    """Runs everything."""
    from vllm import LLM, SamplingParams

    results: dict[str, Any] = {}
    for name in checkpoints:
        is_folder, (golden, *alone) = Path(name).is_dir(), name.split()
        is_golden = golden in golden_data.CHECKPOINTS
        llm = LLM(
            name if is_folder else str(golden_data.checkpoint(golden) if is_golden else TRAINED),
            dtype="float32",
            max_model_len=1024,
            max_num_seqs=8,
            max_num_batched_tokens=256,
            kv_cache_memory_bytes=64 << 20,
            tensor_parallel_size=2,
            additional_config={"twotower": {"towers": "context"}} if alone else {},
        )

        def generate(prompts: list[Any], params: list[Any], llm: LLM = llm) -> list[list[int]]:
            outputs = llm.generate(prompts, params, use_tqdm=False)
            return [list(output.outputs[0].token_ids) for output in outputs]

        def ids(prompts: list[Any]) -> list[dict[str, list[int]]]:
            return [{"prompt_token_ids": list(prompt)} for prompt in prompts]

        found = results[name] = {}
        llm.collective_rpc(count_exchanges)
        if is_folder:
            params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
            found["diffusion"] = generate(ids(PROMPTS), [params] * len(PROMPTS))
        elif is_golden:
            runs = golden_data.diffusion_runs(golden) + golden_data.diffusion_runs(golden, "eos_runs")
            if not alone:
                found["diffusion"] = generate(ids([run.prompt for run in runs]), [run.params() for run in runs])
            prompts = golden_data.prompts(golden)
            params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, extra_args={"diffusion_mode": "ar"})
            found["ar"] = generate(ids([prompt["ids"] for prompt in prompts]), [params] * len(prompts))
        else:
            for mode in MODES:
                found[mode] = generate(PROBLEMS, [trained_params(mode)] * len(PROBLEMS))
        found["greedy_exchanges"] = llm.collective_rpc(exchanged)
        if name == "C":
            drawn = random_requests()
            found["random"] = generate(ids([one.prompt for one in drawn]), [one.params() for one in drawn])
            found["random_exchanges"] = llm.collective_rpc(exchanged)
        llm.llm_engine.engine_core.shutdown()
        del llm, generate
    output.write_text(json.dumps(results))


if __name__ == "__main__":
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # functions to run in the workers
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # servers have their engine in a process; here it takes seconds
    main(Path(sys.argv[1]), sys.argv[2:])
