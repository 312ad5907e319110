"""vLLM's warm-up, which GPU workers run at startup and CPU workers since vLLM 0.33, with any of the engine's modes."""

from __future__ import annotations

from typing import Any
from unittest import mock

import golden_data
import numpy as np
import pytest
from comparisons import model
from engines import core, generate, runner, running_engine, tokens_of
from oracle import expected
from vllm import SamplingParams
from vllm.v1.core.sched.output import GrammarOutput
from vllm.v1.worker.gpu import warmup

PROMPT = list(range(20, 45))


@pytest.mark.parametrize(
    "twotower",
    [{"mode": mode} for mode in ("mask_diffusion", "ar", "verified", "auto")] + [{"towers": "context"}],
    ids=str,
)
@pytest.mark.parametrize("limits", [{}, {"max_num_seqs": 1, "max_num_batched_tokens": 8}], ids=["default", "small"])
@pytest.mark.parametrize("is_greedy", [False, True])
def test_warm_up(twotower: dict[str, Any], limits: dict[str, int], is_greedy: bool) -> None:
    """It sends requests past the scheduler: as sampling parameters vLLM's own, and grammars of one row each or more."""
    modes = ("ar",) if "towers" in twotower else ("ar", "mask_diffusion")
    params = [
        SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, extra_args={"diffusion_mode": mode})
        for mode in modes
    ]
    with running_engine(golden_data.checkpoint("A"), twotower, **limits) as llm:
        worker = core(llm).model_executor.driver_worker.worker
        width = runner(llm).decode_query_len

        def sample_tokens(grammar: GrammarOutput | None) -> Any:
            if grammar is not None:
                ids = grammar.structured_output_request_ids
                rows = np.full((len(ids) * width, grammar.grammar_bitmask.shape[1]), -1, dtype=np.int32)
                grammar = GrammarOutput(ids, rows)
            return worker.sample_tokens(grammar)

        own = SamplingParams(temperature=0) if is_greedy else SamplingParams.for_sampler_warmup()
        with mock.patch.object(SamplingParams, "for_sampler_warmup", return_value=own):
            warmup.warmup_kernels(runner(llm), worker.execute_model, worker.sample_tokens)
            warmup.warmup_kernels(runner(llm), worker.execute_model, sample_tokens)
        outputs = generate(llm, [PROMPT] * len(params), params)
    assert tokens_of(outputs) == [tuple(expected(model(), PROMPT, param).token_ids) for param in params]
