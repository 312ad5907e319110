"""The kernels behind log-probabilities on a CPU (upstream: vllm/v1/worker/gpu/sample/logprob.py, prompt_logprob.py).

The two that read logits are written in torch, because numpy has no bfloat16.

Shapes: R = rows (requests) of this step, T = its tokens, L = logit rows, SLOTS = max_num_reqs. Results go into the
arguments.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_twotower.patches.cpu_runner.kernel import CpuKernel, rows_and_offsets

# Logit rows worked on at a time. Bounds the temporary copies: 16 rows of 131072 logits take 8 MiB in fp32.
CHUNK_ROWS = 16


class TorchKernel(CpuKernel):
    """Calls a torch function instead: it gets the tensors as they are."""

    def launch(self, *args: Any, **options: Any) -> None:
        self.function(*args, **options)


@TorchKernel
def topk_log_softmax(
    output: Tensor,  # [L, topk] float32, out
    logits: Tensor,  # [L, vocab], any float type
    logits_stride: int,
    topk_ids: Tensor,  # [L, topk] int64
    topk_ids_stride: int,
    topk: int,
    vocab_size: int,
    **_launch_options: Any,
) -> None:
    """Write the log-probabilities of each row's given tokens, computed in fp32."""
    for rows in row_chunks(logits):
        logprobs = logits[rows].log_softmax(dim=-1, dtype=torch.float32)
        output[rows] = logprobs.gather(-1, topk_ids[rows])


@TorchKernel
def ranks(
    output: Tensor,  # [L] int64, out
    logits: Tensor,  # [L, vocab], any float type
    logits_stride: int,
    token_ids: Tensor,  # [L]
    vocab_size: int,
    **_launch_options: Any,
) -> None:
    """Write how many of each row's logits are at least as large as that of its token: 1 for the largest."""
    for rows in row_chunks(logits):
        own = logits[rows].gather(-1, token_ids[rows, None].long())
        # int32 holds any rank and is faster than the int64 that sum takes by default.
        output[rows] = (logits[rows] >= own).sum(dim=-1, dtype=torch.int32)


def row_chunks(logits: Tensor) -> Iterator[slice]:
    """The rows of `logits` in slices of at most CHUNK_ROWS."""
    for start in range(0, logits.shape[0], CHUNK_ROWS):
        yield slice(start, start + CHUNK_ROWS)


@CpuKernel
def prompt_logprobs_token_ids(
    prompt_logprobs_token_ids: np.ndarray,  # [T] int64, out
    query_start_loc: np.ndarray,  # [>= R + 1]: row r owns the tokens [query_start_loc[r], query_start_loc[r + 1])
    idx_mapping: np.ndarray,  # [R]: the rows' slots
    num_computed_tokens: np.ndarray,  # [SLOTS]
    all_token_ids: np.ndarray,  # [SLOTS, max_model_len] int32
    all_token_ids_stride: int,
    **_launch_options: Any,
) -> None:
    """Write for each token the one after it in its sequence; 0 past the end of the table."""
    bounds = query_start_loc[: idx_mapping.shape[0] + 1]
    rows, offsets = rows_and_offsets(bounds)
    slots = idx_mapping[rows]
    positions = num_computed_tokens[slots] + 1 + offsets
    max_model_len = all_token_ids.shape[1]
    tokens = all_token_ids[slots, np.minimum(positions, max_model_len - 1)]
    prompt_logprobs_token_ids[bounds[0] : bounds[-1]] = np.where(positions < max_model_len, tokens, 0)
