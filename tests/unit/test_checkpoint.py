"""The official key layout: strict reading, and the released 30B model's shapes without its weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from math import prod
from pathlib import Path

import golden_data
import pytest
import torch
from safetensors.torch import save_file

from vllm_twotower.architecture import CheckpointError, TwoTowerConfig, tensor_shapes
from vllm_twotower.checkpoint import WeightCheck, read_tensors
from vllm_twotower.planning.released import RELEASED_CONFIG
from vllm_twotower.reference import TwoTowerModel


@pytest.mark.parametrize("name", golden_data.CHECKPOINTS)
def test_layout_is_that_of_the_checkpoints(name: str) -> None:
    config = TwoTowerConfig.from_pretrained(golden_data.checkpoint(name))
    found = {key: tuple(tensor.shape) for key, tensor in read_tensors(golden_data.checkpoint(name))}
    assert found == tensor_shapes(config)


def test_released_model_has_31_6_billion_parameters_a_tower() -> None:
    shapes = tensor_shapes(TwoTowerConfig.from_dict(RELEASED_CONFIG))
    for tower, head in (("context_tower.", "context_lm_head."), ("denoiser_tower.", "lm_head.")):
        count = sum(prod(shape) for name, shape in shapes.items() if name.startswith((tower, head)))
        assert round(count / 1e9, 3) == 31.578


@pytest.fixture
def released_vllm_config(tmp_path: Path) -> Iterator[object]:
    """vLLM's configuration for the released model, in an initialised single-process group."""
    vllm = pytest.importorskip("vllm")
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )

    (tmp_path / "config.json").write_text(json.dumps(RELEASED_CONFIG))
    config = vllm.EngineArgs(model=str(tmp_path), skip_tokenizer_init=True, max_model_len=4096).create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{tmp_path}/store", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        yield config
    cleanup_dist_env_and_memory()


def test_every_tensor_of_the_released_model_has_a_place(released_vllm_config) -> None:
    """The vLLM model on the meta device takes every tensor of the layout; each parameter gets one."""
    from vllm.utils.torch_utils import set_default_torch_dtype

    from vllm_twotower.model.two_tower import NemotronHTwoTowerForCausalLM

    with set_default_torch_dtype(torch.bfloat16), torch.device("meta"):
        model = NemotronHTwoTowerForCausalLM(vllm_config=released_vllm_config)
    shapes = tensor_shapes(model.checkpoint_config)
    loaded = model.load_weights((name, torch.empty(shape, device="meta")) for name, shape in shapes.items())
    assert loaded == {name for name, _ in model.named_parameters()}
    assert sum(p.numel() for p in model.parameters()) == sum(map(prod, shapes.values()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("t_block.1.bias"), r"missing .*t_block\.1\.bias \[192\]"),
        (lambda t: t.update(extra=torch.zeros(2)), r"unexpected tensor extra \[2\]"),
        (
            lambda t: t.update({"lm_head.weight": torch.zeros(320, 63)}),
            r"lm_head\.weight has shape \[320, 63\].* \[320, 64\]",
        ),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_a_wrong_tensor_is_named(tmp_path: Path, change, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        TwoTowerModel.from_pretrained(golden_data.changed_checkpoint(tmp_path / "changed", change))


def test_many_missing_tensors_are_counted() -> None:
    with pytest.raises(CheckpointError, match=r"and \d+ more"):
        WeightCheck(TwoTowerConfig.from_pretrained(golden_data.checkpoint("A"))).finish()


def test_sharded_checkpoint(tmp_path: Path) -> None:
    source = golden_data.checkpoint("A")
    shutil.copy(source / "config.json", tmp_path)
    tensors = list(read_tensors(source))
    save_file(dict(tensors[::2]), tmp_path / "model-00001-of-00002.safetensors")
    save_file(dict(tensors[1::2]), tmp_path / "model-00002-of-00002.safetensors")
    whole, sharded = (TwoTowerModel.from_pretrained(folder).state_dict() for folder in (source, tmp_path))
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hybrid_override_pattern", "MX", "MX"),
        ("hybrid_override_pattern", None, "hybrid_override_pattern"),
        ("num_key_value_heads", 3, "num_key_value_heads"),
        ("n_group", 4, "n_group"),
        ("hidden_size", None, "hidden_size"),
    ],
)
def test_a_wrong_configuration_is_named(field: str, value: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        TwoTowerConfig.from_dict({**RELEASED_CONFIG, field: value})
