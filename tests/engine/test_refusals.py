"""Engine options that cannot be served are refused before anything is loaded, naming the option and its value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engines
import golden_data
import pytest
import torch
from vllm import EngineArgs

CHECKPOINT = str(golden_data.checkpoint("A"))


def config(**options: Any):
    """vLLM's configuration, as both ``LLM`` and ``vllm serve`` build it."""
    return EngineArgs(model=CHECKPOINT, dtype="float32", max_num_seqs=4, **options).create_engine_config()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pipeline_parallel_size": 2}, ("pipeline_parallel_size=2", "tensor parallelism")),
        ({"enable_expert_parallel": True}, ("enable_expert_parallel=True", "divided by width")),
        ({"data_parallel_size": 2}, ("data_parallel_size=2", "experts", "independent servers")),
        ({"tensor_parallel_size": 3}, ("tensor_parallel_size=3", "num_key_value_heads (2)", "sizes that fit: 1, 2")),
        ({"prefix_match_unit": 16}, ("prefix_match_unit=16", "whole pages")),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            ("kv_connector='ExampleConnector'", "device's memory"),
        ),
        ({"kv_offloading_size": 1.0}, ("kv_offloading_size=1.0", "device's memory")),
        ({"enable_lora": True}, ("enable_lora", "LoRA")),
        ({"hf_overrides": {"bidirectional_mamba": True}}, ("bidirectional_mamba=True", "vllm_twotower.reference")),
        ({"async_scheduling": True}, ("async_scheduling=True",)),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            ("speculative_config='ngram'",),
        ),
        ({"additional_config": {"twotower": {"commit": "lazy"}}}, ("commit='lazy'", "removed")),
        ({"additional_config": {"twotower": {"confidence_threshold": 0}}}, ("confidence_threshold=0",)),
        ({"additional_config": {"twotower": {"threshold": 0.5}}}, ("'threshold'", "confidence_threshold")),
        ({"diffusion_config": {"canvas_length": 16, "max_denoising_steps": 0}}, ("max_denoising_steps=0", "1024")),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_refused_to_start(options: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:
        config(**options)
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, f"{missing} not in {error.value}"


def test_model_runner_v1_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    with pytest.raises(ValueError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        config()


def test_defaults_start() -> None:
    made = config()
    assert made.cache_config.enable_prefix_caching
    assert made.cache_config.mamba_cache_mode == "align"
    assert made.diffusion_config.canvas_length == 16
    assert made.use_v2_model_runner


def test_prefix_caching_can_be_turned_off() -> None:
    made = config(enable_prefix_caching=False)
    assert not made.cache_config.enable_prefix_caching
    assert made.cache_config.mamba_cache_mode == "none"


@pytest.mark.parametrize(("chosen", "used"), [("auto", "vllm_twotower.engine.worker.RankWorker"), ("my.Worker",) * 2])
def test_ranks_notice_their_errors_unless_the_user_has_a_worker(chosen: str, used: str) -> None:
    assert config(tensor_parallel_size=2, worker_cls=chosen).parallel_config.worker_cls == used


@pytest.mark.parametrize(
    ("name", "needed"),
    [("max_num_batched_tokens", 64), ("max_num_scheduled_tokens", 64), ("long_prefill_token_threshold", 16)],
)
def test_what_would_cut_a_canvas_is_raised(name: str, needed: int) -> None:
    """A canvas that is never whole is never denoised: no answer, no error."""
    assert getattr(config(**{name: 8}).scheduler_config, name) == needed
    assert getattr(config(**{name: 100}).scheduler_config, name) == 100


def test_diffusion_config_sets_the_canvas() -> None:
    made = config(diffusion_config={"canvas_length": 8, "max_denoising_steps": 4})
    assert made.model_config.hf_config.twotower["canvas_length"] == 8
    assert made.model_config.hf_config.twotower["max_denoising_steps"] == 4
    assert made.num_speculative_tokens == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("lm_head.weight"), r"missing .*lm_head\.weight \[320, 64\]"),
        (lambda tensors: tensors.update(spare=torch.zeros(1)), r"unexpected tensor spare \[1\]"),
        (
            lambda tensors: tensors.update({"scale_shift_tables.0": torch.zeros(2, 64)}),
            r"scale_shift_tables\.0 has shape \[2, 64\].*\[3, 64\]",
        ),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_the_engine_names_a_wrong_tensor(tmp_path: Path, change, message: str) -> None:
    folder = golden_data.changed_checkpoint(tmp_path / "changed", change)
    with pytest.raises(ValueError, match=message), engines.running_engine(folder):
        pass
