"""The kernels around a step's inputs and results in numpy (upstream: vllm/v1/worker/gpu/input_batch.py).

Shapes: R = rows (requests) of this step, T = its tokens, L = its logit rows, SLOTS = max_num_reqs. A row's request
lives in slot ``idx_mapping[row]`` of the per-request arrays. ``query_start_loc`` and ``cu_num_logits`` hold the rows'
bounds: row r owns ``[bounds[r], bounds[r + 1])``. Index arrays are int32 or int64. Results go into the arguments.
"""

from typing import Any

import numpy as np

from vllm_twotower.patches.cpu_runner.kernel import CpuKernel, bounds_of, rows_and_offsets


@CpuKernel
def prepare_prefill_inputs(
    input_ids: np.ndarray,  # [>= T] int32, out
    next_prefill_tokens: np.ndarray,  # [num_lookahead, SLOTS] int32, out
    next_prefill_tokens_stride: int,
    num_lookahead: int,
    idx_mapping: np.ndarray,  # [R]
    query_start_loc: np.ndarray,  # [>= R + 1]
    all_token_ids: np.ndarray,  # [SLOTS, max_model_len] int32
    all_token_ids_stride: int,
    prefill_lens: np.ndarray,  # [SLOTS]
    num_computed_tokens: np.ndarray,  # [SLOTS]
    **_launch_options: Any,
) -> None:
    """Copy the prefilling rows' tokens to the input, and the tokens after them (0 past the end) to the lookahead."""
    rows = np.flatnonzero(num_computed_tokens[idx_mapping] < prefill_lens[idx_mapping])
    slots = idx_mapping[rows]
    starts = query_start_loc[rows]
    query_lens = query_start_loc[rows + 1] - starts
    computed = num_computed_tokens[slots]

    row, offset = rows_and_offsets(bounds_of(query_lens))
    input_ids[starts[row] + offset] = all_token_ids[slots[row], computed[row] + offset]

    positions = computed + query_lens + np.arange(num_lookahead)[:, None]  # [num_lookahead, rows]
    tokens = all_token_ids[slots, np.minimum(positions, all_token_ids.shape[1] - 1)]
    next_prefill_tokens[:, slots] = np.where(positions < prefill_lens[slots], tokens, 0)


@CpuKernel
def prepare_pos_seq_lens(
    pos: np.ndarray,  # [>= T] int64, out
    seq_lens: np.ndarray,  # [>= max_num_reqs] int32, out
    idx_mapping: np.ndarray,  # [R]
    query_start_loc: np.ndarray,  # [>= R + 1]
    num_computed_tokens: np.ndarray,  # [SLOTS]
    max_num_reqs: int,
    **_launch_options: Any,
) -> None:
    """Write each token's position in its sequence, and each row's length after this step (0 for unused rows)."""
    num_reqs = idx_mapping.shape[0]
    bounds = query_start_loc[: num_reqs + 1]
    computed = num_computed_tokens[idx_mapping]
    seq_lens[:num_reqs] = computed + bounds[1:] - bounds[:-1]
    seq_lens[num_reqs:max_num_reqs] = 0
    rows, offsets = rows_and_offsets(bounds)
    pos[bounds[0] : bounds[-1]] = computed[rows] + offsets


@CpuKernel
def combine_sampled_and_draft_tokens(
    input_ids: np.ndarray,  # [>= T] int32, out
    idx_mapping: np.ndarray,  # [R]
    last_sampled_tokens: np.ndarray,  # [SLOTS, 1] int64
    query_start_loc: np.ndarray,  # [>= R + 1]
    seq_lens: np.ndarray,  # [>= R]
    prefill_len: np.ndarray,  # [SLOTS]
    draft_tokens: np.ndarray,  # [SLOTS, num_speculative_steps] int64
    draft_tokens_stride: int,
    cu_num_logits: np.ndarray,  # [R + 1]
    logits_indices: np.ndarray,  # [L] int64, out
    NUM_NEW_SAMPLED_TOKENS: int = 1,
    **_launch_options: Any,
) -> None:
    """Point the logit rows at the last tokens of their row, and write the generating rows' tokens to the input.

    A row's logit rows cover its last sampled token (if NUM_NEW_SAMPLED_TOKENS is 1) and then its drafts. Rows still
    inside their prompt keep their input; so does a sampled token's place if it lies inside the prompt.
    """
    num_reqs = idx_mapping.shape[0]
    bounds = cu_num_logits[: num_reqs + 1]
    num_logits = bounds[1:] - bounds[:-1]
    rows, offsets = rows_and_offsets(bounds)
    places = (query_start_loc[1 : num_reqs + 1] - num_logits)[rows] + offsets
    logits_indices[bounds[0] : bounds[-1]] = places

    slots = idx_mapping[rows]
    seq_lens = seq_lens[:num_reqs]
    prompt_ends = prefill_len[idx_mapping]
    is_generating = (seq_lens > prompt_ends)[rows]
    is_draft = offsets >= NUM_NEW_SAMPLED_TOKENS

    write = is_generating & is_draft
    input_ids[places[write]] = draft_tokens[slots[write], offsets[write] - NUM_NEW_SAMPLED_TOKENS]
    if NUM_NEW_SAMPLED_TOKENS:
        write = is_generating & ~is_draft & (seq_lens - num_logits >= prompt_ends)[rows]
        input_ids[places[write]] = last_sampled_tokens[slots[write], 0]


@CpuKernel
def post_update(
    idx_mapping: np.ndarray,  # [R]; a negative slot means: skip this row
    num_computed_tokens: np.ndarray,  # [SLOTS] int32, changed in place
    last_sampled_tokens: np.ndarray,  # [SLOTS, 1] int64, out
    output_bin_counts: np.ndarray | None,  # [SLOTS, vocab] int32, changed in place
    output_bin_counts_stride: int,
    sampled_tokens: np.ndarray,  # [R, >= num_sampled] int64
    sampled_tokens_stride: int,
    num_sampled: np.ndarray,  # [R] int32
    num_rejected: np.ndarray,  # [R] int32
    query_start_loc: np.ndarray | None,  # [>= R + 1]; None counts as empty queries
    all_token_ids: np.ndarray,  # [SLOTS, max_model_len] int32, changed in place
    all_token_ids_stride: int,
    total_len: np.ndarray,  # [SLOTS] int32, changed in place
    draft_tokens: np.ndarray | None = None,  # [R, drafts] int64; this and the next two since vLLM 0.33
    draft_tokens_out: np.ndarray | None = None,  # [SLOTS, drafts] int64, out
    num_draft_tokens: int = 0,
    **_launch_options: Any,
) -> None:
    """Append each row's sampled tokens to its sequence and count its accepted inputs as computed; store its drafts."""
    accepted = -num_rejected
    if query_start_loc is not None:
        bounds = query_start_loc[: idx_mapping.shape[0] + 1]
        accepted += bounds[1:] - bounds[:-1]
    rows = np.flatnonzero(idx_mapping >= 0)
    num_computed_tokens[idx_mapping[rows]] += accepted[rows]
    if draft_tokens is not None and draft_tokens_out is not None:
        draft_tokens_out[idx_mapping[rows]] = draft_tokens[rows]

    rows = rows[num_sampled[rows] > 0]
    if not rows.shape[0]:
        return
    slots, counts = idx_mapping[rows], num_sampled[rows]
    row, offset = rows_and_offsets(bounds_of(counts))
    tokens = sampled_tokens[rows[row], offset]
    all_token_ids[slots[row], total_len[slots[row]] + offset] = tokens
    last_sampled_tokens[slots, 0] = sampled_tokens[rows, counts - 1]
    total_len[slots] += counts
    if output_bin_counts is not None:
        np.add.at(output_bin_counts, (slots[row], tokens), 1)


@CpuKernel
def post_update_num_computed_tokens(
    idx_mapping: np.ndarray,  # [R]
    num_computed_tokens: np.ndarray,  # [SLOTS] int32, changed in place
    query_start_loc: np.ndarray,  # [>= R + 1]
    **_launch_options: Any,
) -> None:
    """Count every row's inputs as computed."""
    bounds = query_start_loc[: idx_mapping.shape[0] + 1]
    num_computed_tokens[idx_mapping] += bounds[1:] - bounds[:-1]


@CpuKernel
def expand_idx_mapping(
    idx_mapping: np.ndarray,  # [R]
    expanded_idx_mapping: np.ndarray,  # [L] like idx_mapping, out
    expanded_local_pos: np.ndarray,  # [L] int32, out
    cu_num_logits: np.ndarray,  # [R + 1]
    **_launch_options: Any,
) -> None:
    """Write each logit row's slot and its place among its request's logit rows."""
    bounds = cu_num_logits[: idx_mapping.shape[0] + 1]
    rows, offsets = rows_and_offsets(bounds)
    expanded_idx_mapping[bounds[0] : bounds[-1]] = idx_mapping[rows]
    expanded_local_pos[bounds[0] : bounds[-1]] = offsets
