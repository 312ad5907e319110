"""Bytes of caches a request holds, against what the design implies, and the largest logits of a step.

A request should hold the pages of its tokens and one Mamba state a layer, like an autoregressive one; and logits should
never be there for all canvas positions at once. Compares the engine's own figures with the cost model's formulas:

    python benchmarks/memory.py
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from closed_loop import TINY, problems, start
from summary import Summary

from vllm_twotower.architecture import TwoTowerConfig
from vllm_twotower.offline import fastest_dtype
from vllm_twotower.planning.model_size import ModelSize


def main() -> None:
    """Measures and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=TINY)
    parser.add_argument("--open", type=int, default=16)
    Summary.add_argument(parser)
    args = parser.parse_args()
    summary = Summary(args.summary)

    from vllm import SamplingParams
    from vllm.v1.kv_cache_interface import MambaSpec

    llm = start(args.model, max_num_seqs=args.open)
    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    element = runner.model_state.model_config.dtype.itemsize
    config = TwoTowerConfig.from_pretrained(args.model)
    size, layers = ModelSize.of(config, 1, element, element, 4), config.pattern
    canvas = runner.model_state.options.canvas_length

    rows, model = [], runner.model
    head = model.logits_processor.forward
    model.logits_processor.forward = lambda lm_head, hidden: rows.append(len(hidden)) or head(lm_head, hidden)

    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    for i, problem in enumerate(problems(args.model)[: args.open]):
        llm.llm_engine.add_request(str(i), problem["prompt"], params)
    for _ in range(4):
        llm.llm_engine.step()
    scheduler, specs = core.scheduler, core.scheduler.kv_cache_config.kv_cache_groups
    states = pages = implied = 0
    for request in scheduler.running:
        for group, blocks in zip(specs, scheduler.kv_cache_manager.get_block_ids(request.request_id), strict=True):
            held = len(blocks) * len(group.layer_names)
            if isinstance(group.kv_cache_spec, MambaSpec):
                states += held
            else:
                page = group.kv_cache_spec.block_size
                pages += held * page
                implied += held // len(blocks) * -(-(request.num_computed_tokens + canvas) // page) * page
    count = len(scheduler.running)
    vocab = runner.model_state.model_config.get_vocab_size()
    tile = runner.model.logit_tile
    print(f"dtype {fastest_dtype()}; {count} requests\n")
    print("| figure | measured | implied | ratio |")
    print("|---|---|---|---|")
    figures = (
        ("Mamba states per request and layer", states / count / layers.count("M"), 1.0, ""),
        ("token slots per request", pages / count / layers.count("*"), implied / count / layers.count("*"), "slots"),
        ("state bytes per request", size.state_bytes * states / count / layers.count("M"), size.state_bytes, "bytes"),
        ("largest logits of a step", max(rows) * vocab * 4, min(tile, count * canvas) * vocab * 4, "bytes"),
    )
    for name, measured, design, unit in figures:
        print(f"| {name} | {measured:.0f} | {design:.0f} | {measured / design:.2f} |")
        summary.add(name, measured, "the design", design, unit)


if __name__ == "__main__":
    main()
