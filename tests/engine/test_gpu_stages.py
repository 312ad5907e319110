"""The stages of `benchmarks/gpu.py` on a CPU, as far as one can run them: that they measure what they say."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import golden_data
import pytest
from engines import runner, running_engine
from vllm.platforms import current_platform

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu  # noqa: E402
import gpu_stages  # noqa: E402
import pass_times  # noqa: E402

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="looks into vLLM's layers as they are on a CPU")

NARROW = gpu_stages.Setting().config | {
    "hidden_size": 64,
    "vocab_size": 320,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "ssm_state_size": 16,
    "n_groups": 2,
    "chunk_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 48,
}
ON_CPU = gpu_stages.Setting("cpu", NARROW, "float32", (1, 3), 32, {"kv_cache_memory_bytes": 64 << 20})


def test_every_stage_is_there() -> None:
    assert [stage.name for stage in gpu.STAGES] == list(gpu_stages.STAGES)


@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_pass_is_one_run_of_its_tower(num_rows: int) -> None:
    """Runs of the towers are counted in the place of seconds, so the result is exact."""

    def runs_of(tower: Any) -> pass_times.Measure:
        def measure(step: Callable[[], Any]) -> tuple[Any, float]:
            with mock.patch.object(tower, "forward", wraps=tower.forward) as forward:
                return step(), forward.call_count

        return measure

    with running_engine(golden_data.checkpoint("A")) as llm:
        model = runner(llm).model
        context = pass_times.passes(llm, num_rows, 32, runs_of(model.context_tower), blocks=3)
        denoiser = pass_times.passes(llm, num_rows, 32, runs_of(model.denoiser_tower), blocks=3)
    assert context == pass_times.Passes(A=1, C=1, D=0, around_A=0, around_D=0)
    assert denoiser == pass_times.Passes(A=0, C=0, D=1, around_A=0, around_D=0)


def test_experts_are_those_that_tokens_are_routed_to() -> None:
    tokens = ON_CPU.rows[-1] * 16
    with gpu_stages.five_layers(ON_CPU, enforce_eager=True) as llm:
        moe = runner(llm).model.denoiser_tower.layers[1].mixer
        route, chosen = moe.route, []

        def noted(x: Any) -> Any:
            experts, weights = route(x)
            chosen.append(len(experts.unique()))
            return experts, weights

        with pass_times.routed(runner(llm).model, 2) as seen, mock.patch.object(moe, "route", noted):
            pass_times.run(llm, ON_CPU.rows[-1], 32, "mask_diffusion", 1, pass_times.seconds, blocks=2)
    assert seen["denoiser_tower", tokens][::2] == chosen
    assert seen["context_tower", tokens]


@pytest.mark.slow
def test_the_table_of_passes(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    gpu_stages.passes(ON_CPU, gpu_stages.Rows(file))
    rows = {row["what"]: row for row in json.loads(file.read_text())}
    for kind in "DCA":
        for num_rows in ("1 row", "3 rows"):
            for engine in ("eager", "default"):
                row = rows[f"{kind}, {num_rows}, {engine}, CPU_ATTN"]
                assert row["figure"] > row["other_figure"] > 0
