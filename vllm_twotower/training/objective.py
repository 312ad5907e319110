"""The training losses: weighted means of the cross-entropy, in nats."""

import torch.nn.functional as F
from torch import Tensor

from vllm_twotower.reference import TwoTowerModel
from vllm_twotower.reference.layers import BlockAttention
from vllm_twotower.training.config import DenoiserStageConfig
from vllm_twotower.training.data import ARBatch, DenoiserBatch


def weighted_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor, total: Tensor) -> Tensor:
    """Scalar fp32 from logits (..., V), targets (...) and weights (...), whose sum over all parts is ``total``."""
    losses = F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / total


def ar_loss(model: TwoTowerModel, batch: ARBatch) -> Tensor:
    """Next-token loss of the context tower."""
    logits = model.context_logits(batch.tokens)
    return weighted_cross_entropy(logits, batch.targets, batch.weights, batch.total_weight)


def denoiser_loss(
    model: TwoTowerModel, batch: DenoiserBatch, stage: DenoiserStageConfig, attention: BlockAttention
) -> Tensor:
    """Loss of the denoiser at the masked positions, no weight 1/t; and the context tower's, if it has a weight."""
    logits = model.denoise_blocks(
        batch.tokens, batch.block_starts, batch.canvas, batch.t, not stage.freeze_context, attention
    )
    loss = weighted_cross_entropy(logits, batch.targets, batch.weights * batch.masked, batch.total_weight)
    if stage.context_ar_weight:
        logits = model.context_logits(batch.tokens)
        loss = loss + stage.context_ar_weight * weighted_cross_entropy(
            logits, batch.context_targets, batch.context_weights, batch.total_context_weight
        )
    return loss
