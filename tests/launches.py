"""How many kernels a pass launches on a GPU, counted on a CPU.

Operations of torch that make or change a tensor are one each. What is a kernel of its own on a GPU counts as so many
launches as vLLM's or our code for GPUs has there, whatever it does on a CPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch_layers
from replay import storage, tensors_in
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from vllm_twotower.engine import decision, pass_planner
from vllm_twotower.model import context, denoiser, step_logits
from vllm_twotower.model.context import GatedNorm
from vllm_twotower.model.moe_cpu import CpuMoE
from vllm_twotower.sampling import strategies

KERNELS = {
    "commit_states": 2,
    "drawn": 1,
    "gated_residual_norm": 1,
    "masses": 1,
    "most_confident": 1,
    "row_statistics": 2,
    "seeded_conv": 1,
    "seeded_scan": 1,
    "uniform": 2,
}
LAYERS: tuple[tuple[Any, str, str, int], ...] = (
    (RMSNorm, "forward", "norms", 1),
    (GatedNorm, "forward", "norms", 1),
    (UnquantizedLinearMethod, "apply", "matrix products", 1),
    (LogitsProcessor, "forward", "matrix products", 1),
    (VocabParallelEmbedding, "forward", "embeddings", 1),
    (CPUAttentionBackendImpl, "do_kv_cache_update", "attention", 1),
    (CPUAttentionBackendImpl, "forward", "attention", 2),  # and putting parts of long sequences together
    # Router: product, choice. Experts: sorting in 2, two products, activation, sum. Shared: three. Scale, sum.
    (CpuMoE, "forward", "experts", 13),
)
METADATA = 4
"""Of attention: FlashAttention 3 plans its work; vLLM's Mamba metadata gathers state indices."""
DECODE = 3
"""vLLM's Mamba layer for one token: convolution, scan, copy."""
MAKE_NOTHING = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::lift_fresh"}


class Launches(TorchDispatchMode):
    """Counts by kind what runs while it is active."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._inside = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        taken = set(map(storage, tensors_in(args, kwargs)))
        makes = any(storage(tensor) not in taken for tensor in tensors_in(result))
        name = function._schema.name
        if not self._inside and name not in MAKE_NOTHING and (makes or function._schema.is_mutable):
            self.counts["other operations"] += 1
        return result

    def one(self, kind: str, launches: int, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, as so many launches."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if not self._inside:
                self.counts[kind] += launches
            self._inside += 1
            try:
                return function(*args, **kwargs)
            finally:
                self._inside -= 1

        return call


@contextmanager
def counted_launches() -> Iterator[Counter[str]]:
    """The counts of what runs in the block, in which :func:`torch_layers.torch_layers` is active."""
    mode = Launches()
    with pytest.MonkeyPatch.context() as patch:
        for module in (context, decision, denoiser, step_logits, strategies):
            for name, launches in KERNELS.items():
                if hasattr(module, name):
                    patch.setattr(module, name, mode.one("kernels of this package", launches, getattr(module, name)))
        for owner, name, kind, launches in LAYERS:
            patch.setattr(owner, name, mode.one(kind, launches, getattr(owner, name)))
        build = mode.one("attention's metadata", METADATA, pass_planner.build_attn_metadata)
        patch.setattr(pass_planner, "build_attn_metadata", build)
        patch.setattr(torch.ops.vllm, "mamba_mixer2", _decode(mode))
        with mode:
            yield mode.counts


def _decode(mode: Launches) -> Callable[..., None]:
    """A Mamba layer of the context tower: vLLM's for one token, or ours."""

    def mix(projected: torch.Tensor, output: torch.Tensor, layer_name: Any) -> None:
        forward = torch_layers.get_forward_context()
        metadata = forward.attn_metadata[torch_layers._resolve_layer_name(layer_name)]
        is_ours = isinstance(metadata, context.UncommittedRead)
        run = torch_layers._mix if is_ours else mode.one("vLLM's Mamba layers", DECODE, torch_layers._mix)
        run(projected, output, layer_name)

    return mix
