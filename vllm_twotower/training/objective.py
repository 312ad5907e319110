"""The two training losses: weighted means of the cross-entropy, in nats."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_twotower.reference import TwoTowerModel
from vllm_twotower.training.data import ARBatch, DenoiserBatch


def weighted_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Scalar fp32 from logits (..., V), targets (...) and weights (...)."""
    losses = F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


def ar_loss(model: TwoTowerModel, batch: ARBatch) -> Tensor:
    """Next-token loss of the context tower."""
    return weighted_cross_entropy(model.context_logits(batch.tokens), batch.targets, batch.weights)


def denoiser_loss(model: TwoTowerModel, batch: DenoiserBatch) -> Tensor:
    """Loss of the denoiser at the masked positions; no weight 1/t."""
    logits = model.denoise_blocks(batch.tokens, batch.block_starts, batch.canvas, batch.t)
    return weighted_cross_entropy(logits, batch.targets, batch.weights * batch.masked)


@torch.inference_mode()
def full_mask_loss_by_kind(model: TwoTowerModel, batch: DenoiserBatch) -> dict[int, float]:
    """Cross-entropy of wholly masked blocks (t = 1) for every kind of block start in the batch."""
    canvas = torch.full_like(batch.targets, model.config.mask_token_id)
    logits = model.denoise_blocks(batch.tokens, batch.block_starts, canvas, torch.ones_like(batch.t))
    result = {}
    for kind in batch.kinds.unique().tolist():
        of_kind = batch.kinds == kind
        result[kind] = weighted_cross_entropy(logits[of_kind], batch.targets[of_kind], batch.weights[of_kind]).item()
    return result
