"""The kernels around a step's inputs and results in torch (upstream: vllm/v1/worker/gpu/input_batch.py).

Shapes: R = rows (requests) of this step, T = its tokens, L = its logit rows, SLOTS = max_num_reqs. A row's request
lives in slot ``idx_mapping[row]`` of the per-request tensors. ``query_start_loc`` and ``cu_num_logits`` hold the rows'
bounds: row r owns ``[bounds[r], bounds[r + 1])``. All index tensors are int32 or int64. Results go into the arguments.
"""

from typing import Any

import torch
from torch import Tensor

from vllm_twotower.patches._torch_kernel import REMOVE_WHEN, UPSTREAM, kernel_installer, when_kernel_cannot_launch
from vllm_twotower.patches.registry import Patch

MODULE = "vllm.v1.worker.gpu.input_batch"


def rows_and_offsets(bounds: Tensor) -> tuple[Tensor, Tensor]:
    """For each element of the rows bounded by `bounds` [R + 1]: its row and its offset inside the row, [elements]."""
    rows = torch.repeat_interleave(bounds.diff())
    return rows, torch.arange(rows.shape[0]) - (bounds - bounds[0])[rows]


def prepare_prefill_inputs(
    input_ids: Tensor,  # [>= T] int32, out
    next_prefill_tokens: Tensor,  # [num_lookahead, SLOTS] int32, out
    next_prefill_tokens_stride: int,
    num_lookahead: int,
    idx_mapping: Tensor,  # [R]
    query_start_loc: Tensor,  # [>= R + 1]
    all_token_ids: Tensor,  # [SLOTS, max_model_len] int32
    all_token_ids_stride: int,
    prefill_lens: Tensor,  # [SLOTS]
    num_computed_tokens: Tensor,  # [SLOTS]
    **_launch_options: Any,
) -> None:
    """Copy the prefilling rows' tokens to the input, and the tokens after them (0 past the end) to the lookahead."""
    rows = (num_computed_tokens[idx_mapping] < prefill_lens[idx_mapping]).nonzero().flatten()
    slots = idx_mapping[rows]
    starts = query_start_loc[rows]
    query_lens = query_start_loc[rows + 1] - starts
    computed = num_computed_tokens[slots]

    row, offset = rows_and_offsets(torch.nn.functional.pad(query_lens.cumsum(0), (1, 0)))
    input_ids[starts[row] + offset] = all_token_ids[slots[row], computed[row] + offset]

    positions = computed + query_lens + torch.arange(num_lookahead).unsqueeze(1)  # [num_lookahead, rows]
    tokens = all_token_ids[slots, positions.clamp(max=all_token_ids.shape[1] - 1)]
    next_prefill_tokens[:, slots] = torch.where(positions < prefill_lens[slots], tokens, 0)


def prepare_pos_seq_lens(
    pos: Tensor,  # [>= T] int64, out
    seq_lens: Tensor,  # [>= max_num_reqs] int32, out
    idx_mapping: Tensor,  # [R]
    query_start_loc: Tensor,  # [>= R + 1]
    num_computed_tokens: Tensor,  # [SLOTS]
    max_num_reqs: int,
    **_launch_options: Any,
) -> None:
    """Write each token's position in its sequence, and each row's length after this step (0 for unused rows)."""
    num_reqs = idx_mapping.shape[0]
    bounds = query_start_loc[: num_reqs + 1]
    computed = num_computed_tokens[idx_mapping]
    seq_lens[:num_reqs] = computed + bounds.diff()
    seq_lens[num_reqs:max_num_reqs] = 0
    rows, offsets = rows_and_offsets(bounds)
    first = int(bounds[0])
    pos[first : first + rows.shape[0]] = computed[rows] + offsets


def combine_sampled_and_draft_tokens(
    input_ids: Tensor,  # [>= T] int32, out
    idx_mapping: Tensor,  # [R]
    last_sampled_tokens: Tensor,  # [SLOTS, 1] int64
    query_start_loc: Tensor,  # [>= R + 1]
    seq_lens: Tensor,  # [>= R]
    prefill_len: Tensor,  # [SLOTS]
    draft_tokens: Tensor,  # [SLOTS, num_speculative_steps] int64
    draft_tokens_stride: int,
    cu_num_logits: Tensor,  # [R + 1]
    logits_indices: Tensor,  # [L] int64, out
    NUM_NEW_SAMPLED_TOKENS: int = 1,
    **_launch_options: Any,
) -> None:
    """Point the logit rows at the last tokens of their row, and write the generating rows' tokens to the input.

    A row's logit rows cover its last sampled token (if NUM_NEW_SAMPLED_TOKENS is 1) and then its drafts. Rows still
    inside their prompt keep their input; so does a sampled token's place if it lies inside the prompt.
    """
    num_reqs = idx_mapping.shape[0]
    cu_num_logits = cu_num_logits[: num_reqs + 1]
    rows, offsets = rows_and_offsets(cu_num_logits)
    num_logits = cu_num_logits.diff()
    places = (query_start_loc[1 : num_reqs + 1] - num_logits)[rows] + offsets
    first = int(cu_num_logits[0])
    logits_indices[first : first + rows.shape[0]] = places

    slots = idx_mapping[rows]
    seq_lens = seq_lens[:num_reqs]
    prompt_ends = prefill_len[idx_mapping]
    is_generating = (seq_lens > prompt_ends)[rows]
    is_draft = offsets >= NUM_NEW_SAMPLED_TOKENS

    write = is_generating & is_draft
    input_ids[places[write]] = draft_tokens[slots[write], offsets[write] - NUM_NEW_SAMPLED_TOKENS].to(input_ids.dtype)
    if NUM_NEW_SAMPLED_TOKENS:
        write = is_generating & ~is_draft & (seq_lens - num_logits >= prompt_ends)[rows]
        input_ids[places[write]] = last_sampled_tokens.view(-1)[slots[write]].to(input_ids.dtype)


def post_update(
    idx_mapping: Tensor,  # [R]; a negative slot means: skip this row
    num_computed_tokens: Tensor,  # [SLOTS] int32, changed in place
    last_sampled_tokens: Tensor,  # [SLOTS, 1] int64, out
    output_bin_counts: Tensor | None,  # [SLOTS, vocab] int32, changed in place
    output_bin_counts_stride: int,
    sampled_tokens: Tensor,  # [R, >= num_sampled] int64
    sampled_tokens_stride: int,
    num_sampled: Tensor,  # [R] int32
    num_rejected: Tensor,  # [R] int32
    query_start_loc: Tensor | None,  # [>= R + 1]; None counts as empty queries
    all_token_ids: Tensor,  # [SLOTS, max_model_len] int32, changed in place
    all_token_ids_stride: int,
    total_len: Tensor,  # [SLOTS] int32, changed in place
    **_launch_options: Any,
) -> None:
    """Append each row's sampled tokens to its sequence and count its accepted inputs as computed."""
    num_reqs = idx_mapping.shape[0]
    computed = -num_rejected if query_start_loc is None else query_start_loc[: num_reqs + 1].diff() - num_rejected
    slots = idx_mapping
    if bool((slots < 0).any()):
        kept = (slots >= 0).nonzero().flatten()
        slots, computed, num_sampled, sampled_tokens = (
            tensor[kept] for tensor in (slots, computed, num_sampled, sampled_tokens)
        )
    num_computed_tokens.index_add_(0, slots, computed.to(num_computed_tokens.dtype))

    rows = num_sampled.nonzero().flatten()
    if not rows.shape[0]:
        return
    slots, counts, sampled_tokens = slots[rows], num_sampled[rows], sampled_tokens[rows]
    row, offset = rows_and_offsets(torch.nn.functional.pad(counts.cumsum(0), (1, 0)))
    tokens = sampled_tokens[row, offset]
    all_token_ids[slots[row], total_len[slots[row]] + offset] = tokens.to(all_token_ids.dtype)
    last_tokens = sampled_tokens.gather(1, counts.long().unsqueeze(1) - 1).squeeze(1)
    last_sampled_tokens.view(-1)[slots] = last_tokens.to(last_sampled_tokens.dtype)
    total_len[slots] += counts
    if output_bin_counts is not None:
        one = output_bin_counts.new_ones(())
        output_bin_counts.index_put_((slots[row], tokens), one, accumulate=True)


def post_update_num_computed_tokens(
    idx_mapping: Tensor,  # [R]
    num_computed_tokens: Tensor,  # [SLOTS] int32, changed in place
    query_start_loc: Tensor,  # [>= R + 1]
    **_launch_options: Any,
) -> None:
    """Count every row's inputs as computed."""
    query_lens = query_start_loc[: idx_mapping.shape[0] + 1].diff()
    num_computed_tokens.index_add_(0, idx_mapping, query_lens.to(num_computed_tokens.dtype))


def expand_idx_mapping(
    idx_mapping: Tensor,  # [R]
    expanded_idx_mapping: Tensor,  # [L] like idx_mapping, out
    expanded_local_pos: Tensor,  # [L] int32, out
    cu_num_logits: Tensor,  # [R + 1]
    **_launch_options: Any,
) -> None:
    """Write each logit row's slot and its place among its request's logit rows."""
    bounds = cu_num_logits[: idx_mapping.shape[0] + 1]
    rows, offsets = rows_and_offsets(bounds)
    first = int(bounds[0])
    expanded_idx_mapping[first : first + rows.shape[0]] = idx_mapping[rows]
    expanded_local_pos[first : first + rows.shape[0]] = offsets


def kernel_patch(name: str, function: Any, launcher: str, why: str, sha256: dict[str, str]) -> Patch:
    """The record of one kernel of this module; `launcher` is the upstream function that launches it."""
    kernel = f"{MODULE}:_{launcher}_kernel"
    return Patch(
        name=name,
        target=kernel,
        what=f"Runs the kernel of {launcher} in torch.",
        why=f"Without Triton {why}.",
        upstream=UPSTREAM,
        remove_when=REMOVE_WHEN,
        applies_when=when_kernel_cannot_launch(kernel),
        sources=(kernel, f"{MODULE}:{launcher}"),
        source_sha256=sha256,
        install=kernel_installer(kernel, function),
    )


PATCHES = (
    kernel_patch(
        name="prepare-prefill-inputs",
        function=prepare_prefill_inputs,
        launcher="prepare_prefill_inputs",
        why="prompts never reach the model's input",
        sha256={"0.32.0": "2f1d468bc34d727f65390ec20135926b7d009a411e921ac118446300d692b980"},
    ),
    kernel_patch(
        name="prepare-pos-seq-lens",
        function=prepare_pos_seq_lens,
        launcher="prepare_pos_seq_lens",
        why="no step can be prepared",
        sha256={"0.32.0": "2776a359c20cbe16f3cdc3715038d26bd55788cdc06bc43b14785fa8a2f36f1f"},
    ),
    kernel_patch(
        name="combine-sampled-and-draft-tokens",
        function=combine_sampled_and_draft_tokens,
        launcher="combine_sampled_and_draft_tokens",
        why="the canvas, which vLLM carries as draft tokens, never reaches the model's input",
        sha256={"0.32.0": "6da1eaeaa76e19cf05b50fcac2b71303eaaa181c9fe0912a940e82e36b7aa436"},
    ),
    kernel_patch(
        name="post-update",
        function=post_update,
        launcher="post_update",
        why="no step's result can be booked",
        sha256={"0.32.0": "5a5499627dcf75f7b8b49987ac226361da31bb8cb874efacb28adc18832e6c84"},
    ),
    kernel_patch(
        name="post-update-num-computed-tokens",
        function=post_update_num_computed_tokens,
        launcher="post_update_num_computed_tokens",
        why="pipeline stages before the last cannot count their computed tokens",
        sha256={"0.32.0": "eb756afbbbceb495e381cb4d7751925939f539ce9b378135b12096aa5cb8fb2a"},
    ),
    kernel_patch(
        name="expand-idx-mapping",
        function=expand_idx_mapping,
        launcher="expand_idx_mapping",
        why="canvas positions cannot be mapped back to their requests",
        sha256={"0.32.0": "f6155e156c610b8962308f4877d010ee6af9dc98b5f9e052750c0ba0312c46ad"},
    ),
)
