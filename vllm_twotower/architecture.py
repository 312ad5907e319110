"""The architecture of a TwoTower: its configuration, and the tensors of a checkpoint in the official layout.

Everything that must know which tensors a checkpoint holds asks :func:`tensor_shapes`: the plain reference model, the
vLLM model class and the tools. The layout is that of NVIDIA's released Nemotron TwoTower checkpoint. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ARCHITECTURE = "NemotronHTwoTowerForCausalLM"
DEFAULT_CANVAS_LENGTH = 16
DEFAULT_MASK_TOKEN_ID = 3
TIMESTEP_FREQUENCIES = 256
"""Width of the sinusoidal time embedding: 128 cosines, then 128 sines."""

_LAYER_LETTERS = {
    "mamba": "M",
    "linear_attention": "M",
    "attention": "*",
    "full_attention": "*",
    "moe": "E",
    "mlp": "-",
}
"""The layers' names in the ``layers_block_type`` of newer configurations."""


class CheckpointError(ValueError):
    """A checkpoint does not have the tensors or the configuration that the TwoTower layout asks for."""


def layer_pattern(config: Mapping[str, Any]) -> str:
    """The letters of the layers from a ``config.json`` of either form: a pattern, or a list of names.

    Raises :class:`CheckpointError` for an unknown name; empty if the configuration has neither.
    """
    if pattern := config.get("hybrid_override_pattern"):
        return pattern
    names = config.get("layers_block_type") or config.get("layer_types") or []
    if unknown := sorted(set(names) - set(_LAYER_LETTERS)):
        raise CheckpointError(f"layers_block_type has {unknown}: known are {sorted(_LAYER_LETTERS)}")
    return "".join(_LAYER_LETTERS[name] for name in names)


@dataclass(frozen=True)
class TwoTowerConfig:
    """The part of a TwoTower ``config.json`` that decides shapes and arithmetic; field names are NVIDIA's.

    Both towers have the same dimensions. ``pattern`` has one character a layer: ``M`` Mamba-2, ``*`` attention,
    ``E`` mixture of experts, ``-`` dense MLP.
    """

    pattern: str
    hidden_size: int
    vocab_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    mamba_num_heads: int
    mamba_head_dim: int
    ssm_state_size: int
    n_groups: int
    conv_kernel: int
    layer_norm_epsilon: float
    intermediate_size: int = 0
    n_routed_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    moe_shared_expert_intermediate_size: int = 0
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    attention_bias: bool = False
    mlp_bias: bool = False
    mamba_proj_bias: bool = False
    use_conv_bias: bool = True
    eos_token_id: int = 2
    mask_token_id: int = DEFAULT_MASK_TOKEN_ID
    bidirectional_mamba: bool = False
    canvas_length: int = DEFAULT_CANVAS_LENGTH

    def __post_init__(self) -> None:
        letters = list(dict.fromkeys(_LAYER_LETTERS.values()))
        if not self.pattern or set(self.pattern) - set(letters):
            raise CheckpointError(
                f"hybrid_override_pattern is {self.pattern!r}: it needs one of {letters} for every layer"
            )
        for heads, groups in (
            ("num_attention_heads", "num_key_value_heads"),
            ("mamba_num_heads", "n_groups"),
        ):
            if getattr(self, heads) % getattr(self, groups):
                raise CheckpointError(
                    f"{heads} ({getattr(self, heads)}) must be a multiple of {groups} ({getattr(self, groups)})"
                )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> TwoTowerConfig:
        """Reads the fields from a ``config.json`` dictionary; raises :class:`CheckpointError` naming a missing one.

        A feature of Nemotron-H that no TwoTower uses (expert groups, another activation, tied embeddings) is refused.
        """
        config = dict(config)
        config["pattern"] = layer_pattern(config)
        for name, allowed in (("n_group", 1), ("mlp_hidden_act", "relu2"), ("tie_word_embeddings", False)):
            value = config.get(name, allowed)
            if value != allowed:
                raise CheckpointError(f"{name} is {value!r}: a TwoTower checkpoint needs {allowed!r}")
        eos = config.get("eos_token_id")
        if isinstance(eos, list):
            config["eos_token_id"] = eos[0]
        known = {field.name for field in fields(cls)}
        try:
            return cls(**{name: value for name, value in config.items() if name in known and value is not None})
        except TypeError as error:
            raise CheckpointError(f"config.json lacks a field of the TwoTower configuration: {error}") from None

    @classmethod
    def of(cls, hf_config: PretrainedConfig) -> TwoTowerConfig:
        """Reads the fields from the configuration object that transformers makes of a ``config.json``."""
        return cls.from_dict({**hf_config.to_dict(), "hybrid_override_pattern": hf_config.hybrid_override_pattern})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> TwoTowerConfig:
        """Reads ``folder/config.json``."""
        return cls.from_dict(json.loads((Path(folder) / "config.json").read_text()))

    @property
    def num_hidden_layers(self) -> int:
        return len(self.pattern)

    @property
    def mamba_intermediate_size(self) -> int:
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the Mamba convolution: x, then B and C of every group."""
        return self.mamba_intermediate_size + 2 * self.n_groups * self.ssm_state_size


def _linear(name: str, out_features: int, in_features: int, bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (out_features, in_features)
    if bias:
        yield f"{name}.bias", (out_features,)


def _mixer_shapes(kind: str, c: TwoTowerConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden = c.hidden_size
    if kind == "M":
        inner, heads = c.mamba_intermediate_size, c.mamba_num_heads
        yield from ((name, (heads,)) for name in ("A_log", "D", "dt_bias"))
        yield "conv1d.weight", (c.conv_dim, 1, c.conv_kernel)
        if c.use_conv_bias:
            yield "conv1d.bias", (c.conv_dim,)
        yield from _linear("in_proj", inner + c.conv_dim + heads, hidden, c.mamba_proj_bias)
        yield "norm.weight", (inner,)
        yield from _linear("out_proj", hidden, inner, c.mamba_proj_bias)
    elif kind == "*":
        query, key_value = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        yield from _linear("q_proj", query, hidden, c.attention_bias)
        yield from _linear("k_proj", key_value, hidden, c.attention_bias)
        yield from _linear("v_proj", key_value, hidden, c.attention_bias)
        yield from _linear("o_proj", hidden, query, c.attention_bias)
    else:
        if kind == "E":
            yield "gate.weight", (c.n_routed_experts, hidden)
            yield "gate.e_score_correction_bias", (c.n_routed_experts,)
            feed_forwards = [(f"experts.{i}.", c.moe_intermediate_size) for i in range(c.n_routed_experts)]
            feed_forwards.append(("shared_experts.", c.moe_shared_expert_intermediate_size))
        else:
            feed_forwards = [("", c.intermediate_size)]
        for prefix, width in feed_forwards:
            yield from _linear(f"{prefix}up_proj", width, hidden, c.mlp_bias)
            yield from _linear(f"{prefix}down_proj", hidden, width, c.mlp_bias)


def is_of_context(name: str) -> bool:
    """Whether a tensor is the context tower's or its head's; all others only the denoiser needs."""
    return name.startswith(("context_tower.", "context_lm_head."))


def tensor_shapes(config: TwoTowerConfig, context_alone: bool = False) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint with this configuration: name -> shape, in the official key layout.

    With ``context_alone`` those of the context tower and its head.
    """
    c, hidden = config, config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {}
    for tower in ("context_tower", "denoiser_tower"):
        shapes[f"{tower}.embeddings.weight"] = (c.vocab_size, hidden)
        for i, kind in enumerate(c.pattern):
            shapes[f"{tower}.layers.{i}.norm.weight"] = (hidden,)
            shapes.update((f"{tower}.layers.{i}.mixer.{name}", shape) for name, shape in _mixer_shapes(kind, c))
        shapes[f"{tower}.norm_f.weight"] = (hidden,)
    shapes["context_lm_head.weight"] = shapes["lm_head.weight"] = (c.vocab_size, hidden)
    shapes.update(_linear("t_embedder.mlp.0", hidden, TIMESTEP_FREQUENCIES, True))
    shapes.update(_linear("t_embedder.mlp.2", hidden, hidden, True))
    shapes.update(_linear("t_block.1", 3 * hidden, hidden, True))
    shapes.update((f"scale_shift_tables.{i}", (3, hidden)) for i in range(c.num_hidden_layers))
    return {name: shape for name, shape in shapes.items() if is_of_context(name) or not context_alone}
