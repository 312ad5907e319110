"""TwoTower in plain PyTorch: a causal context tower, and a denoiser tower that reads the context tower's states.

The module's state dict has the official key layout. The state is explicit: a list with one entry a layer. The same
code generates (batch of one) and trains (batches of sequences, several blocks of each at once).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vllm_twotower.architecture import TwoTowerConfig, tensor_shapes
from vllm_twotower.checkpoint import WeightCheck, read_quantization, read_tensors
from vllm_twotower.model.time_conditioning import TimestepEmbedder

from .layers import (
    MLP,
    Attend,
    Attention,
    AttentionState,
    BlockAttention,
    LayerState,
    Mamba2,
    MambaTrace,
    MoE,
    RMSNorm,
    causal_mask,
    dense_attention,
    dense_blocks,
)

_MIXERS = {
    "M": Mamba2,
    "*": Attention,
    "E": MoE,
    "-": lambda c: MLP(c.hidden_size, c.intermediate_size, c.mlp_bias),
}


@dataclass
class Conditioning:
    """adaLN-single: shift, scale and gate of every layer, each (R, H), R the number of blocks."""

    layers: list[tuple[Tensor, Tensor, Tensor]]


class Layer(nn.Module):
    """One residual layer: norm and mixer."""

    def __init__(self, c: TwoTowerConfig, kind: str):
        super().__init__()
        self.kind = kind
        self.norm = RMSNorm(c.hidden_size, c.layer_norm_epsilon)
        self.mixer: Any = _MIXERS[kind](c)

    def modulated_norm(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Mamba and attention layers modulate before the norm, MLP and MoE layers after it."""
        if self.kind in "M*":
            return self.norm(x * (1 + scale) + shift)
        return self.norm(x) * (1 + scale) + shift


class Tower(nn.Module):
    """Embeddings, layers and final norm of one Nemotron-H tower."""

    def __init__(self, c: TwoTowerConfig):
        super().__init__()
        self.embeddings = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = cast(Sequence[Layer], nn.ModuleList(Layer(c, kind) for kind in c.pattern))
        self.norm_f = RMSNorm(c.hidden_size, c.layer_norm_epsilon)
        self.bidirectional_mamba = c.bidirectional_mamba

    def advance(
        self, tokens: Tensor, past: list[LayerState] | None, attend: Attend
    ) -> tuple[Tensor, list[AttentionState | MambaTrace | None]]:
        """Runs over tokens (B, L) after ``past``: hidden states (B, L, H) and what each layer saw.

        ``attend`` must be causal, as the Mamba layers are.
        """
        x = self.embeddings(tokens)
        seen: list[AttentionState | MambaTrace | None] = []
        for i, layer in enumerate(self.layers):
            state, y = past[i] if past else None, layer.norm(x)
            trace = None
            if layer.kind == "*":
                y, trace = layer.mixer(y, state, attend)
            elif layer.kind == "M":
                y, trace = layer.mixer(y, state)
            else:
                y = layer.mixer(y)
            seen.append(trace)
            x = x + y
        return self.norm_f(x), seen

    def denoise(
        self, canvas: Tensor, context: list[LayerState] | None, conditioning: Conditioning | None, attend: Attend
    ) -> Tensor:
        """Runs over the canvases (B, N, S), bidirectional within each; hidden states (B, N, S, H).

        Attention sees what ``attend`` lets it. Mamba layers go from left to right; with ``bidirectional_mamba`` (an
        option of Megatron's) they go both ways, back from a state of zeros, and the two outputs are averaged.

        ``context`` holds the context tower's keys and values (B, P, ...) and its Mamba states before every block
        (B * N, ...).
        """
        batch, blocks, _ = canvas.shape
        x = self.embeddings(canvas)
        for i, layer in enumerate(self.layers):
            state = context[i] if context else None
            if conditioning is None:
                y = layer.norm(x)
            else:
                shift, scale, gate = (part.view(batch, blocks, 1, -1) for part in conditioning.layers[i])
                y = layer.modulated_norm(x, shift, scale)
            if layer.kind == "*":
                y = layer.mixer(y.flatten(1, 2), state, attend)[0]
            elif layer.kind == "M":
                rows = y.flatten(0, 1)
                y = layer.mixer(rows, state)[0]
                if self.bidirectional_mamba:
                    y = (y + layer.mixer(rows.flip(1), None)[0].flip(1)) / 2
            else:
                y = layer.mixer(y)
            y = y.view_as(x)
            x = x + (y if conditioning is None else gate * y)
        return self.norm_f(x)


class TwoTowerModel(nn.Module):
    """The whole model with both towers, both heads and the time conditioning; any dtype and device."""

    def __init__(self, config: TwoTowerConfig):
        super().__init__()
        self.config = c = config
        self.context_tower = Tower(c)
        self.context_lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.denoiser_tower = Tower(c)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.t_embedder = TimestepEmbedder(c.hidden_size)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(c.hidden_size, 3 * c.hidden_size))
        self.scale_shift_tables = nn.ParameterList(torch.zeros(3, c.hidden_size) for _ in c.pattern)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> TwoTowerModel:
        """Loads a checkpoint folder strictly; raises :class:`~vllm_twotower.architecture.CheckpointError`."""
        config, quantization = TwoTowerConfig.from_pretrained(folder), read_quantization(folder)
        check = WeightCheck(config, quantization)
        found = check.seen(read_tensors(folder))
        if quantization is not None:
            found = quantization.plain_tensors(found, tensor_shapes(config))
        tensors = {name: tensor.to(device, dtype) for name, tensor in found}
        check.finish()
        with torch.device("meta"):
            model = cls(config)
        model.load_state_dict(tensors, assign=True)
        return model.eval().requires_grad_(False)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype) -> None:
        """Writes ``folder/model.safetensors`` in the official key layout."""
        tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, Path(folder) / "model.safetensors", {"format": "pt"})

    def context_logits(self, tokens: Tensor) -> Tensor:
        """Next-token logits (B, L, V) of the context tower for tokens (B, L)."""
        return self.context_lm_head(self._read(tokens)[0])

    def _read(self, tokens: Tensor) -> tuple[Tensor, list[AttentionState | MambaTrace | None]]:
        """The context tower over whole sequences; memory grows with their length, not with its square."""
        return self.context_tower.advance(tokens, None, partial(dense_attention, is_causal=True))

    def advance_context(self, tokens: Tensor, past: list[LayerState] | None) -> tuple[Tensor, list[LayerState]]:
        """Commits tokens (B, L) after ``past``: context-head logits of the last one (B, V), and the new state."""
        known = next((state.keys.shape[1] for state in past or () if isinstance(state, AttentionState)), 0)
        mask = causal_mask(tokens.shape[1], known, tokens.device)
        hidden, seen = self.context_tower.advance(tokens, past, partial(dense_attention, mask=mask))
        state: list[LayerState] = [
            layer.mixer.state_after(trace) if isinstance(trace, MambaTrace) else trace
            for layer, trace in zip(self.context_tower.layers, seen, strict=True)
        ]
        return self.context_lm_head(hidden[:, -1]), state

    def conditioning(self, t: Tensor) -> Conditioning:
        """Shift, scale and gate of every layer for times t (R,): the table plus one shared projection of t."""
        shared = self.t_block(self.t_embedder(t)).unflatten(-1, (3, -1))
        return Conditioning([(table + shared).unbind(1) for table in self.scale_shift_tables])

    def denoiser_logits(self, canvas: Tensor, context: list[LayerState] | None, t: Tensor | None) -> Tensor:
        """Logits (S, V) of one denoiser pass over a canvas (S,) after ``context``; t (1,), or None for no adaLN."""
        conditioning = None if t is None else self.conditioning(t)
        hidden = self.denoiser_tower.denoise(canvas[None, None], context, conditioning, dense_attention)
        return self.lm_head(hidden)[0, 0]

    def denoise_blocks(
        self,
        tokens: Tensor,
        block_starts: Tensor,
        canvas: Tensor,
        t: Tensor,
        train_context: bool = False,
        attention: BlockAttention = dense_blocks,
    ) -> Tensor:
        """Denoiser logits (B, N, S, V) for N blocks of each sequence at once: the training forward.

        Block n of a sequence sees the context tower's states of the positions before ``block_starts[:, n]`` (any
        position from 0 to L) and itself. The context tower runs without gradient (it is frozen) unless it is to be
        trained too.

        Args: tokens (B, L) clean; block_starts (B, N); canvas (B, N, S) with masks; t (B, N); how blocks attend.
        """
        with torch.set_grad_enabled(train_context and torch.is_grad_enabled()):
            _, seen = self._read(tokens)
            context: list[LayerState] = [
                trace.state_before(block_starts, layer.mixer.history) if isinstance(trace, MambaTrace) else trace
                for layer, trace in zip(self.context_tower.layers, seen, strict=True)
            ]
        attend = attention(block_starts, canvas.shape[2], tokens.shape[1])
        hidden = self.denoiser_tower.denoise(canvas, context, self.conditioning(t.flatten()), attend)
        return self.lm_head(hidden)
