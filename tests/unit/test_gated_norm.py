"""The gated norm of Mamba layers with several groups, which is one kernel on GPUs."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.mamba import mamba_mixer2

from vllm_twotower.model import context
from vllm_twotower.model.context import GatedNorm


def norm_of_groups(x, weight, bias, z, eps, group_size, norm_before_gate) -> torch.Tensor:
    """What vLLM's ``rms_norm_gated`` says it computes."""
    assert bias is None
    assert not norm_before_gate
    x = (x * torch.nn.functional.silu(z)).unflatten(-1, (-1, group_size))
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)).flatten(-2) * weight


@pytest.mark.parametrize(("groups", "ranks", "launches"), [(8, 1, 1), (8, 4, 1), (1, 1, 1), (2, 4, 0)])
def test_groups_are_normed_by_one_kernel(
    groups: int, ranks: int, launches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where each rank has whole groups; the kernel is given what the operations of torch give."""
    calls = []

    def kernel(x, weight, bias, z, eps=1e-6, group_size=None, norm_before_gate=True):
        calls.append(group_size)
        return norm_of_groups(x, weight, bias, z, eps, group_size or x.shape[-1], norm_before_gate)

    for module in (context, mamba_mixer2):
        monkeypatch.setattr(module, "rms_norm_gated", kernel)
    monkeypatch.setattr(mamba_mixer2, "get_tensor_model_parallel_world_size", lambda: ranks)
    monkeypatch.setattr(mamba_mixer2, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(mamba_mixer2, "tensor_model_parallel_all_gather", lambda x, dim: torch.cat([x] * ranks, dim))
    with set_current_vllm_config(VllmConfig()):
        norm = GatedNorm(64, groups, eps=1e-5)
    generator = torch.Generator().manual_seed(groups)
    norm.weight.data = torch.randn(64 // ranks, generator=generator)
    x, gate = torch.randn(2, 5, 64 // ranks, generator=generator)
    torch.testing.assert_close(norm.forward_cuda(x, gate), norm.forward_native(x, gate))
    assert len(calls) == launches
    if groups > 1 and launches:
        assert calls == [64 // groups]
