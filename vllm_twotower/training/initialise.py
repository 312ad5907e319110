"""Starting values: random ones for the context tower, and the trained context tower for the denoiser."""

import math

import torch
from torch import nn

from vllm_twotower.reference import TwoTowerModel
from vllm_twotower.reference.layers import GatedGroupRMSNorm, Mamba2, RMSNorm, Router

EMBEDDING_STD = 0.3
HEAD_STD = 0.02  # first predictions nearly uniform
ROUTER_STD = 0.02
DT_RANGE = (1e-3, 0.1)  # Mamba-2's time steps at the start (arXiv 2405.21060, reference code)
A_RANGE = (1.0, 16.0)


def initialise(model: TwoTowerModel, seed: int) -> None:
    """Random weights, 1/sqrt(inputs), outputs of residual branches 1/sqrt(layers) of it; norms are 1.

    Every parameter is set, by the seed alone: whatever the model was before.
    """
    generator = torch.Generator().manual_seed(seed)
    depth = len(model.config.pattern)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            std = 1 / math.sqrt(module.in_features)
            if name.endswith(("out_proj", "o_proj", "down_proj")):
                std /= math.sqrt(depth)
            elif name.endswith("lm_head"):
                std = HEAD_STD
            nn.init.normal_(module.weight, std=std, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=EMBEDDING_STD, generator=generator)
        elif isinstance(module, Router):
            nn.init.normal_(module.weight, std=ROUTER_STD, generator=generator)
            nn.init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, (RMSNorm, GatedGroupRMSNorm)):
            nn.init.ones_(module.weight)
        elif isinstance(module, Mamba2):
            _initialise_mamba(module, generator)
    start_denoiser_from_context(model)
    _make_time_conditioning_neutral(model)


@torch.no_grad()
def _initialise_mamba(mixer: Mamba2, generator: torch.Generator) -> None:
    conv = mixer.conv1d
    nn.init.normal_(conv.weight, std=1 / math.sqrt(conv.kernel_size[0]), generator=generator)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    uniform = torch.rand(2, mixer.heads, generator=generator)
    low, high = (math.log(bound) for bound in DT_RANGE)
    dt = torch.exp(low + (high - low) * uniform[0])
    mixer.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
    mixer.A_log.copy_((A_RANGE[0] + (A_RANGE[1] - A_RANGE[0]) * uniform[1]).log())
    mixer.D.fill_(1)


@torch.no_grad()
def start_denoiser_from_context(model: TwoTowerModel) -> None:
    """Copies tower and head; the time conditioning stays as it is."""
    model.denoiser_tower.load_state_dict(model.context_tower.state_dict())
    model.lm_head.load_state_dict(model.context_lm_head.state_dict())


@torch.no_grad()
def _make_time_conditioning_neutral(model: TwoTowerModel) -> None:
    """Shift 0, scale 0, gate 1 at every t."""
    for parameter in model.t_block[-1].parameters():
        parameter.zero_()
    for table in model.scale_shift_tables:
        table.zero_()
        table[2] = 1


def tie_towers(model: TwoTowerModel) -> None:
    """Makes one tower of both: the context tower's modules become the denoiser's, too."""
    model.denoiser_tower = model.context_tower
