"""A checkpoint like NVIDIA's released one at small widths: its config.json, shards and index, and tokenizer files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vllm_twotower.architecture import TwoTowerConfig, is_of_context, tensor_shapes
from vllm_twotower.checkpoint import INDEX
from vllm_twotower.planning.released import RELEASED_CONFIG

TINY = Path(__file__).parents[1] / "models" / "tiny-twotower"
NAMES = ("Nemotron-TwoTower-30B-A3B-Base-BF16", "Nemotron-Labs-TwoTower-30B-A3B-Base-BF16")
"""The older and the newer name of the released model."""
NUM_SHARDS = 24

AS_PUBLISHED: dict[str, Any] = {
    "auto_map": {
        "AutoConfig": "configuration_nemotron_h.NemotronHConfig",
        "AutoModelForCausalLM": "modeling_nemotron_twotower.NemotronHTwoTowerForCausalLM",
    },
    "expand": 2,
    "mamba_hidden_act": "silu",
    "mamba_proj_bias": False,
    "norm_eps": 1e-05,
    "partial_rotary_factor": 1.0,
    "residual_in_fp32": False,
    "rope_theta": 10000,
    "sliding_window": None,
    "time_step_floor": 0.0001,
    "time_step_limit": [0.0, float("inf")],  # Infinity in the file, which is no valid JSON
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "use_bias": False,
}
"""Fields of its config.json that decide nothing here."""
_SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "vocab_size": 1024,
    "num_attention_heads": 4,
    "head_dim": 32,
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "ssm_state_size": 16,
    "n_groups": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 64,
    "intermediate_size": 32,
}
_REMOTE_CODE = {
    "configuration_nemotron_h.py": '''
from transformers import PretrainedConfig


class NemotronHConfig(PretrainedConfig):
    """The pattern is a field, and the layers' types are made of it."""

    model_type = "nemotron_h"

    def __init__(self, hybrid_override_pattern="M", num_hidden_layers=1, use_bias=False, **fields):
        assert len(hybrid_override_pattern) == num_hidden_layers
        self.hybrid_override_pattern, self.num_hidden_layers = hybrid_override_pattern, num_hidden_layers
        self.use_bias = use_bias
        super().__init__(**fields)

    @property
    def layers_block_type(self):
        return [{"M": "mamba", "*": "attention", "E": "moe"}[letter] for letter in self.hybrid_override_pattern]
''',
    "modeling_nemotron_twotower.py": "import mamba_ssm\n",
    "tokenization_twotower.py": '''
from transformers import PreTrainedTokenizerFast


class TwoTowerTokenizer(PreTrainedTokenizerFast):
    """What only remote code knows."""
''',
}


def save(folder: Path, remote_tokenizer: bool = False) -> Path:
    """Writes the checkpoint ``folder``, with random weights; the tokenizer is the tiny model's."""
    folder.mkdir(parents=True)
    content = RELEASED_CONFIG | AS_PUBLISHED | _SMALL
    (folder / "config.json").write_text(json.dumps(content, indent=2))
    for file, text in _REMOTE_CODE.items():
        (folder / file).write_text(text)
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        shutil.copy(TINY / file, folder)
    if remote_tokenizer:
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings["tokenizer_class"] = "TwoTowerTokenizer"
        settings["auto_map"] = {"AutoTokenizer": [None, "tokenization_twotower.TwoTowerTokenizer"]}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    generator = torch.Generator().manual_seed(0)
    shapes = tensor_shapes(TwoTowerConfig.from_dict(content))
    _write_shards(folder, {name: _random(name, shape, generator) for name, shape in shapes.items()})
    return folder


def delete_denoiser(folder: Path) -> int:
    """Deletes the files that hold nothing of the context tower, as one does by hand: the index stays. Their number."""
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    kept = {file for name, file in weight_map.items() if is_of_context(name)}
    deleted = set(weight_map.values()) - kept
    for file in deleted:
        (folder / file).unlink()
    return len(deleted)


def _write_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """The tensors in their order, the experts one by one; the two towers share the file in which they meet."""
    names, weight_map = list(tensors), {}
    for number in range(NUM_SHARDS):
        of_shard = names[number * len(names) // NUM_SHARDS : (number + 1) * len(names) // NUM_SHARDS]
        file = f"model-{number + 1:05}-of-{NUM_SHARDS:05}.safetensors"
        save_file({name: tensors[name] for name in of_shard}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(of_shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2))


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    drawn = torch.randn(shape, generator=generator)
    if name.endswith("A_log"):
        drawn = drawn.abs()
    elif name.endswith(("norm.weight", "norm_f.weight")):
        drawn = 1 + 0.1 * drawn
    else:
        drawn *= 0.5 if len(shape) == 1 else shape[-1] ** -0.5
    return drawn.bfloat16()
