"""Each CPU kernel against a slow per-row loop over Python numbers, written from what vLLM's Triton kernel does."""

import math
import random
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.v1.attention.backends.utils import PAD_SLOT_ID

import vllm_twotower.patches as patches
from vllm_twotower.patches import registry
from vllm_twotower.patches.cpu_runner import block_tables as cpu_block_tables
from vllm_twotower.patches.cpu_runner import input_batch, kv_zeroing, logprobs, staged_writes

SLOTS = 9
MAX_LEN = 64
SPEC = 4  # num_speculative_steps
STALE = -777  # what lies in an output before the kernel runs

seeds = pytest.mark.parametrize("seed", range(20))
without_triton = pytest.mark.skipif(not registry.runs_on_cpu_without_triton(), reason="for a CPU without Triton")


def tensor(values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def stale(*shape, dtype=torch.int32):
    return torch.full(shape, STALE, dtype=dtype)


def launch(kernel, *args, **options):
    """Call a kernel the way vLLM does, with tensors and a grid."""
    kernel[(1,)](*args, **options)


class Step:
    """Random rows of one step: `num_reqs` requests in random slots, each with a query."""

    def __init__(self, seed: int, min_query_len: int = 0, max_query_len: int = 9):
        self.rng = rng = random.Random(seed)
        self.num_reqs = 0 if seed == 0 else rng.randint(1, 6)
        self.slots = rng.sample(range(SLOTS), self.num_reqs)
        self.query_lens = [rng.randint(min_query_len, max_query_len) for _ in range(self.num_reqs)]
        self.bounds = bounds_of(self.query_lens)
        self.num_tokens = self.bounds[-1]
        self.num_padding_rows = rng.randint(0, 2)
        self.idx_mapping = tensor(self.slots, torch.int64)
        # vLLM hands over bounds that are padded to the row count of a CUDA graph.
        self.query_start_loc = tensor(self.bounds + [self.num_tokens] * self.num_padding_rows)

    def per_slot(self, low: int, high: int) -> list[int]:
        return [self.rng.randint(low, high) for _ in range(SLOTS)]


def bounds_of(lens: list[int]) -> list[int]:
    bounds = [0]
    for length in lens:
        bounds.append(bounds[-1] + length)
    return bounds


def token_table(rng: random.Random, rows: int, columns: int) -> list[list[int]]:
    return [[rng.randint(0, 10**6) for _ in range(columns)] for _ in range(rows)]


@seeds
def test_prepare_prefill_inputs(seed):
    step = Step(seed)
    num_lookahead = 1 + seed % 3
    all_tokens = token_table(step.rng, SLOTS, MAX_LEN)
    computed = step.per_slot(0, 30)
    prefill = step.per_slot(0, 45)
    input_ids, lookahead = stale(step.num_tokens + 5), stale(num_lookahead, SLOTS)
    expected_ids, expected_lookahead = input_ids.tolist(), lookahead.tolist()
    for row, slot in enumerate(step.slots):
        if computed[slot] >= prefill[slot]:
            continue
        for i in range(step.query_lens[row]):
            expected_ids[step.bounds[row] + i] = all_tokens[slot][computed[slot] + i]
        for ahead in range(num_lookahead):
            position = computed[slot] + step.query_lens[row] + ahead
            expected_lookahead[ahead][slot] = all_tokens[slot][position] if position < prefill[slot] else 0

    launch(
        input_batch.prepare_prefill_inputs,
        input_ids,
        lookahead,
        lookahead.stride(0),
        num_lookahead,
        step.idx_mapping,
        step.query_start_loc,
        tensor(all_tokens),
        MAX_LEN,
        tensor(prefill),
        tensor(computed),
        BLOCK_SIZE=1024,
        LOOKAHEAD_BLOCK=4,
    )
    assert input_ids.tolist() == expected_ids
    assert lookahead.tolist() == expected_lookahead


def test_prefill_lookahead_at_the_end_of_the_table_is_zero():
    """The prompt fills the whole row: the token after it must not be read from anywhere."""
    all_tokens = tensor(token_table(random.Random(0), SLOTS, MAX_LEN))
    input_ids, lookahead = stale(MAX_LEN), stale(1, SLOTS)
    launch(
        input_batch.prepare_prefill_inputs,
        input_ids,
        lookahead,
        SLOTS,
        1,
        tensor([SLOTS - 1], torch.int64),
        tensor([0, MAX_LEN]),
        all_tokens,
        MAX_LEN,
        tensor([MAX_LEN] * SLOTS),
        tensor([0] * SLOTS),
    )
    assert input_ids.tolist() == all_tokens[-1].tolist()
    assert lookahead[0, -1] == 0


@seeds
def test_prepare_pos_seq_lens(seed):
    step = Step(seed)
    computed = step.per_slot(0, 1000)
    positions, seq_lens = stale(step.num_tokens + 5, dtype=torch.int64), stale(SLOTS)
    expected_positions = positions.tolist()
    expected_lens = [0] * SLOTS
    for row, slot in enumerate(step.slots):
        expected_lens[row] = computed[slot] + step.query_lens[row]
        for i in range(step.query_lens[row]):
            expected_positions[step.bounds[row] + i] = computed[slot] + i

    launch(
        input_batch.prepare_pos_seq_lens,
        positions,
        seq_lens,
        step.idx_mapping,
        step.query_start_loc,
        tensor(computed),
        SLOTS,
        BLOCK_SIZE=1024,
    )
    assert positions.tolist() == expected_positions
    assert seq_lens.tolist() == expected_lens


@seeds
@pytest.mark.parametrize("num_new", [0, 1])
def test_combine_sampled_and_draft_tokens(seed, num_new):
    step = Step(seed, min_query_len=num_new)
    rng = step.rng
    num_logits = [rng.randint(num_new, min(length, SPEC + num_new)) for length in step.query_lens]
    cu_num_logits = bounds_of(num_logits)
    seq_lens = [rng.randint(length, 40) for length in step.query_lens]
    prefill = step.per_slot(0, 40)
    for row, slot in enumerate(step.slots):  # rows at the end of their prompt are the delicate ones
        if rng.random() < 0.5:
            prefill[slot] = max(0, seq_lens[row] + rng.randint(-SPEC - 1, 1))
    last_sampled = token_table(rng, SLOTS, 1)
    drafts = token_table(rng, SLOTS, SPEC)
    input_ids = stale(step.num_tokens + 5)
    logits_indices = stale(cu_num_logits[-1], dtype=torch.int64)
    expected_ids, expected_indices = input_ids.tolist(), logits_indices.tolist()
    for row, slot in enumerate(step.slots):
        count, end = num_logits[row], step.bounds[row + 1]
        for i in range(count):
            expected_indices[cu_num_logits[row] + i] = end - count + i
        if seq_lens[row] <= prefill[slot]:
            continue
        if num_new and seq_lens[row] - count >= prefill[slot]:
            expected_ids[end - count] = last_sampled[slot][0]
        for i in range(count - num_new):
            expected_ids[end - (count - num_new) + i] = drafts[slot][i]

    launch(
        input_batch.combine_sampled_and_draft_tokens,
        input_ids,
        step.idx_mapping,
        tensor(last_sampled, torch.int64),
        step.query_start_loc,
        tensor(seq_lens + [0] * step.num_padding_rows),
        tensor(prefill),
        tensor(drafts, torch.int64),
        SPEC,
        tensor(cu_num_logits),
        logits_indices,
        NUM_NEW_SAMPLED_TOKENS=num_new,
        BLOCK_SIZE=8,
    )
    assert input_ids.tolist() == expected_ids
    assert logits_indices.tolist() == expected_indices


def test_combine_without_speculative_steps():
    input_ids, logits_indices = stale(3), stale(2, dtype=torch.int64)
    launch(
        input_batch.combine_sampled_and_draft_tokens,
        input_ids,
        tensor([1, 0], torch.int64),
        tensor([[5], [6]], torch.int64),
        tensor([0, 1, 3]),
        tensor([9, 4]),
        tensor([4, 3]),
        torch.zeros(2, 0, dtype=torch.int64),
        0,
        tensor([0, 1, 2]),
        logits_indices,
    )
    assert input_ids.tolist() == [6, STALE, STALE]  # row 1 ends its prompt: its one logit row lies inside the prompt
    assert logits_indices.tolist() == [0, 2]


@seeds
@pytest.mark.parametrize("with_query", [True, False])
@pytest.mark.parametrize("with_counts", [True, False])
@pytest.mark.parametrize("some_skipped", [True, False])
@pytest.mark.parametrize("with_drafts", [True, False])
def test_post_update(seed, with_query, with_counts, some_skipped, with_drafts):
    step, vocab, width = Step(seed), 11, SPEC + 1
    rng = step.rng
    idx_mapping = [-1 if some_skipped and rng.random() < 0.4 else slot for slot in step.slots]
    computed, total_len = step.per_slot(0, 40), step.per_slot(0, MAX_LEN - width)
    num_sampled = [rng.choice([0, 0, 1, width]) for _ in step.slots]
    num_rejected = [rng.randint(0, length) for length in step.query_lens]
    sampled = [[rng.randrange(vocab) for _ in range(width)] for _ in step.slots]
    state = {
        "computed": tensor(computed),
        "last_sampled": stale(SLOTS, 1, dtype=torch.int64),
        "counts": torch.zeros(SLOTS, vocab, dtype=torch.int32) if with_counts else None,
        "all_tokens": stale(SLOTS, MAX_LEN),
        "total_len": tensor(total_len),
        "drafts": stale(SLOTS, SPEC, dtype=torch.int64),
    }
    drafts = [[rng.randrange(vocab) for _ in range(SPEC)] for _ in step.slots]
    expected = {name: None if value is None else value.tolist() for name, value in state.items()}
    for row, slot in enumerate(idx_mapping):
        if slot < 0:
            continue
        if with_drafts:
            expected["drafts"][slot] = drafts[row]
        for token in sampled[row][: num_sampled[row]]:
            expected["all_tokens"][slot][expected["total_len"][slot]] = token
            expected["total_len"][slot] += 1
            expected["last_sampled"][slot] = [token]
            if with_counts:
                expected["counts"][slot][token] += 1
        expected["computed"][slot] += (step.query_lens[row] if with_query else 0) - num_rejected[row]

    launch(
        input_batch.post_update,
        tensor(idx_mapping, torch.int64),
        state["computed"],
        state["last_sampled"],
        state["counts"],
        vocab if with_counts else 0,
        torch.tensor(sampled, dtype=torch.int64).reshape(step.num_reqs, width),
        width,
        tensor(num_sampled),
        tensor(num_rejected),
        step.query_start_loc if with_query else None,
        state["all_tokens"],
        MAX_LEN,
        state["total_len"],
        *((torch.tensor(drafts).reshape(step.num_reqs, SPEC), state["drafts"], SPEC) if with_drafts else ()),
        num_warps=1,
    )
    assert {name: None if value is None else value.tolist() for name, value in state.items()} == expected


@seeds
def test_post_update_num_computed_tokens(seed):
    step = Step(seed)
    computed = tensor(step.per_slot(0, 40))
    expected = computed.tolist()
    for row, slot in enumerate(step.slots):
        expected[slot] += step.query_lens[row]
    launch(input_batch.post_update_num_computed_tokens, step.idx_mapping, computed, step.query_start_loc)
    assert computed.tolist() == expected


@seeds
def test_expand_idx_mapping(seed):
    step = Step(seed)
    num_logits = [step.rng.randint(0, SPEC) for _ in step.slots]
    expanded, local = stale(sum(num_logits), dtype=torch.int64), stale(sum(num_logits))
    launch(
        input_batch.expand_idx_mapping,
        step.idx_mapping,
        expanded,
        local,
        tensor(bounds_of(num_logits)),
        BLOCK_SIZE=SPEC,
    )
    assert expanded.tolist() == [slot for slot, count in zip(step.slots, num_logits, strict=True) for _ in range(count)]
    assert local.tolist() == [i for count in num_logits for i in range(count)]


@seeds
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32])
@pytest.mark.parametrize("columns", [None, MAX_LEN])
def test_apply_write(seed, dtype, columns):
    rng = random.Random(seed)
    shape = (SLOTS,) if columns is None else (SLOTS, columns)
    output = stale(*shape, dtype=dtype)
    expected = output.tolist()
    starts, cu_lens, contents = [], [], []
    rows = rng.sample(range(SLOTS), rng.randint(0, SLOTS))
    for row in rows:
        length = 1 if columns is None else rng.randint(1, 20)
        start = 0 if columns is None else rng.randint(0, columns - length)
        values = [rng.randint(0, 1000) for _ in range(length)]
        if columns is None:
            expected[row] = values[0]
        else:
            expected[row][start : start + length] = values
        starts.append(start)
        contents.extend(values)
        cu_lens.append(len(contents))

    launch(
        staged_writes.apply_write,
        output,
        output.stride(0),
        tensor(rows),
        tensor(starts),
        tensor(contents, dtype),
        tensor(cu_lens),
        None,
        BLOCK_SIZE=1024,
        MULTI_GROUP=False,
    )
    assert output.tolist() == expected


def test_apply_write_keeps_64_bit_addresses():
    """row * stride must not wrap at 32 bits."""
    with pytest.raises(IndexError, match=str(2**17 * 2**17)):
        launch(
            staged_writes.apply_write,
            torch.zeros(1, dtype=torch.int32),
            2**17,
            tensor([2**17]),
            tensor([0]),
            tensor([1]),
            tensor([1]),
            None,
        )


def fake_block_tables(rng: random.Random, num_groups: int) -> SimpleNamespace:
    """The attributes of vLLM's BlockTables that the replaced methods use."""
    block_sizes = [rng.choice([1, 4, 16]) for _ in range(num_groups)]
    widths = [MAX_LEN // block_size + 1 for block_size in block_sizes]
    tables = [tensor(token_table(rng, SLOTS, width)) for width in widths]
    num_blocks = [[rng.randint(0, width) for _ in range(SLOTS)] for width in widths]
    return SimpleNamespace(
        block_sizes=block_sizes,
        num_kv_cache_groups=num_groups,
        block_tables=[SimpleNamespace(gpu=table) for table in tables],
        num_blocks=SimpleNamespace(gpu=tensor(num_blocks).reshape(num_groups, SLOTS)),
        input_block_tables=[torch.full_like(table, STALE) for table in tables],
        slot_mappings=stale(num_groups, 200, dtype=torch.int64),
        _slot_mapping_enabled=[rng.random() < 0.7 for _ in range(num_groups)],
        cp_size=1,
    )


@seeds
@pytest.mark.parametrize("num_groups", [0, 1, 3])
@pytest.mark.parametrize("own_out", [False, True])
def test_gather_block_tables(seed, num_groups, own_out):
    step = Step(seed)
    block_tables = fake_block_tables(step.rng, num_groups)
    out = tuple(torch.full_like(table, STALE) for table in block_tables.input_block_tables) if own_out else None
    written = out if own_out else block_tables.input_block_tables
    expected = [table.tolist() for table in written]
    num_reqs_padded = step.num_reqs + step.num_padding_rows
    for group in range(num_groups):
        source = block_tables.block_tables[group].gpu.tolist()
        for row in range(num_reqs_padded):
            if row >= step.num_reqs:
                expected[group][row] = [0] * len(source[0])
                continue
            count = int(block_tables.num_blocks.gpu[group, step.slots[row]])
            expected[group][row][:count] = source[step.slots[row]][:count]

    result = cpu_block_tables.gather_block_tables(block_tables, step.idx_mapping, num_reqs_padded, out)
    assert [table.tolist() for table in written] == expected
    assert [table.tolist() for table in result] == [table[:num_reqs_padded] for table in expected]
    assert all(view.data_ptr() == table.data_ptr() for view, table in zip(result, written, strict=True))


@seeds
@pytest.mark.parametrize("num_groups", [0, 1, 3])
@pytest.mark.parametrize("some_dummies", [False, True])
@pytest.mark.parametrize("own_out", [False, True])
def test_compute_slot_mappings(seed, num_groups, some_dummies, own_out):
    step = Step(seed)
    rng = step.rng
    block_tables = fake_block_tables(rng, num_groups)
    idx_mapping = [-1 if some_dummies and rng.random() < 0.4 else slot for slot in step.slots]
    positions = [rng.randrange(MAX_LEN) for _ in range(step.num_tokens + 3)]
    out = stale(num_groups, 150, dtype=torch.int64) if own_out else None
    written = out if own_out else block_tables.slot_mappings
    expected = [[PAD_SLOT_ID] * written.shape[1] for _ in range(num_groups)]
    for group in range(num_groups):
        block_size = block_tables.block_sizes[group]
        table = block_tables.block_tables[group].gpu.tolist()
        for row, slot in enumerate(idx_mapping):
            for token in range(step.bounds[row], step.bounds[row + 1]):
                if slot >= 0 and block_tables._slot_mapping_enabled[group]:
                    block, offset = divmod(positions[token], block_size)
                    expected[group][token] = table[slot][block] * block_size + offset

    padded = step.num_tokens + 2
    result = cpu_block_tables.compute_slot_mappings(
        block_tables,
        tensor(idx_mapping, torch.int64),
        step.query_start_loc,
        tensor(positions, torch.int64),
        padded,
        out,
    )
    assert written.tolist() == expected
    assert result.tolist() == [slots[:padded] for slots in expected]
    assert cpu_block_tables.PAD_SLOT_ID == PAD_SLOT_ID


def test_context_parallelism_is_refused():
    block_tables = fake_block_tables(random.Random(0), 1)
    block_tables.cp_size = 2
    with pytest.raises(ValueError, match="decode_context_parallel_size"):
        cpu_block_tables.compute_slot_mappings(block_tables, tensor([0]), tensor([0, 1]), tensor([0]), 1)


@seeds
def test_zero_kv_blocks(seed):
    """Segments of different strides and page sizes, of which two share an allocation."""
    rng = random.Random(seed)
    num_blocks = rng.randint(1, 8)
    block_ids = rng.sample(range(num_blocks), rng.randint(1, num_blocks))
    memory, expected, addresses, strides, pages = [], [], [], [], []
    for _ in range(3):
        stride = rng.randint(2, 40)
        buffer = stale(num_blocks * stride)
        values = buffer.tolist()
        split = rng.randint(1, stride - 1)
        for start, page in ((0, split), (split, rng.randint(1, stride - split))):
            addresses.append(buffer.data_ptr() + 4 * start)
            strides.append(stride)
            pages.append(page)
            for block in block_ids:
                for element in range(page):
                    values[block * stride + start + element] = 0
        memory.append(buffer)
        expected.append(values)

    launch(
        kv_zeroing.zero_kv_blocks,
        torch.tensor(addresses, dtype=torch.uint64),
        tensor(strides, torch.int64),
        tensor(pages, torch.int64),
        tensor(block_ids, torch.int64),
        BLOCK_SIZE=1024,
    )
    assert [buffer.tolist() for buffer in memory] == expected


def random_logits(seed: int, vocab: int, dtype: torch.dtype) -> torch.Tensor:
    """[rows, vocab] with ties and infinities; the rows lie apart in memory, with larger values between them."""
    rng = random.Random(seed)
    num_rows = 0 if seed == 0 else rng.randint(1, 3 * logprobs.CHUNK_ROWS)
    values = [
        [rng.choice([-math.inf, rng.randint(-8, 8), rng.uniform(-20, 20)]) for _ in range(vocab)]
        for _ in range(num_rows)
    ]
    for row in values:
        row[rng.randrange(vocab)] = 3.0  # not every logit is -inf
    memory = torch.full((num_rows, vocab + 5), 1e4, dtype=dtype)
    memory[:, :vocab] = torch.tensor(values).reshape(num_rows, vocab)
    return memory[:, :vocab]


logit_types = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


@seeds
@logit_types
def test_topk_log_softmax(seed, dtype):
    vocab, topk = 37, seed % 5
    rng = random.Random(seed)
    logits = random_logits(seed, vocab, dtype)
    num_rows = logits.shape[0]
    ids = [[rng.randrange(vocab) for _ in range(topk)] for _ in range(num_rows)]
    topk_ids = torch.zeros(num_rows, topk + 2, dtype=torch.int64)[:, :topk]
    topk_ids[:] = torch.tensor(ids, dtype=torch.int64).reshape(num_rows, topk)
    output = stale(num_rows, topk, dtype=torch.float32)
    expected = []
    for row, row_ids in zip(logits.tolist(), ids, strict=True):
        log_sum = math.log(math.fsum(math.exp(logit) for logit in row))
        expected.append([row[token] - log_sum for token in row_ids])

    launch(
        logprobs.topk_log_softmax,
        output,
        logits,
        logits.stride(0),
        topk_ids,
        topk_ids.stride(0),
        topk,
        vocab,
        BLOCK_SIZE=1024,
        TOPK_BLOCK_SIZE=4,
    )
    assert [pytest.approx(row, rel=1e-6, abs=1e-6) for row in expected] == output.tolist()


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@logit_types
def test_topk_log_softmax_of_a_real_vocabulary(dtype, offset):
    """As exact as torch's fp32 log-softmax of all rows at once, whatever the logits' level."""
    num_rows, vocab = logprobs.CHUNK_ROWS + 1, 131072
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(num_rows, vocab, generator=generator) + offset).to(dtype)
    topk_ids = torch.randint(vocab, (num_rows, 20), generator=generator)
    output = stale(num_rows, 20, dtype=torch.float32)
    launch(logprobs.topk_log_softmax, output, logits, vocab, topk_ids, 20, 20, vocab)
    expected = torch.log_softmax(logits.float(), dim=-1).gather(-1, topk_ids)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)


@seeds
@logit_types
@pytest.mark.parametrize("id_type", [torch.int32, torch.int64])
def test_ranks(seed, dtype, id_type):
    vocab = 37
    rng = random.Random(seed)
    logits = random_logits(seed, vocab, dtype)
    tokens = [rng.randrange(vocab) for _ in range(logits.shape[0])]
    output = stale(len(tokens), dtype=torch.int64)
    expected = []
    for row, token in zip(logits.tolist(), tokens, strict=True):
        expected.append(sum(logit >= row[token] for logit in row))

    launch(logprobs.ranks, output, logits, logits.stride(0), tensor(tokens, id_type), vocab, BLOCK_SIZE=8192)
    assert output.tolist() == expected


@seeds
def test_prompt_logprobs_token_ids(seed):
    step = Step(seed)
    computed = step.per_slot(0, MAX_LEN - 1)  # for some rows the last tokens lie past the end of the table
    all_tokens = token_table(step.rng, SLOTS, MAX_LEN)
    output = stale(step.num_tokens + 5, dtype=torch.int64)
    expected = output.tolist()
    for row, slot in enumerate(step.slots):
        for i in range(step.query_lens[row]):
            position = computed[slot] + 1 + i
            expected[step.bounds[row] + i] = all_tokens[slot][position] if position < MAX_LEN else 0

    launch(
        logprobs.prompt_logprobs_token_ids,
        output,
        step.query_start_loc,
        step.idx_mapping,
        tensor(computed),
        tensor(all_tokens),
        MAX_LEN,
        BLOCK_SIZE=1024,
    )
    assert output.tolist() == expected


@pytest.fixture
def worker_buffers(monkeypatch):
    """The host buffers that vLLM's CPU worker uses, and the patched kernels."""
    from vllm.v1.worker.cpu.buffer_utils import UvaBuffer

    monkeypatch.setattr("vllm.v1.worker.gpu.buffer_utils.UvaBuffer", UvaBuffer)
    patches.install_worker_patches()


@without_triton
@pytest.mark.usefixtures("worker_buffers")
@pytest.mark.parametrize("block_sizes", [[16], [16, 4, 16]])
def test_vllms_block_tables_run_on_the_patched_kernels(block_sizes):
    """Staged writes, gathering and slot mapping together, through vLLM's own class, over two steps."""
    from vllm.v1.worker.gpu.block_table import BlockTables

    tables = BlockTables(block_sizes, 4, 64, [8] * len(block_sizes), torch.device("cpu"))
    ids = {slot: [[10 * slot + group] for group in range(len(block_sizes))] for slot in (2, 0)}
    for slot, blocks in ids.items():
        tables.append_block_ids(slot, tuple(blocks), overwrite=True)
    tables.apply_staged_writes()
    tables.append_block_ids(2, tuple([5, 6] for _ in block_sizes), overwrite=False)
    tables.apply_staged_writes()

    idx_mapping = tensor([2, 0], torch.int64)
    for group, table in enumerate(tables.gather_block_tables(idx_mapping, 3)):
        assert table.tolist() == [[20 + group, 5, 6] + [0] * 5, [group] + [0] * 7, [0] * 8]
    slots = tables.compute_slot_mappings(idx_mapping, tensor([0, 2, 3]), tensor([4, 5, 3], torch.int64), 4)
    for group, block_size in enumerate(block_sizes):
        blocks = [20 + group, 5, 6]
        two = [blocks[position // block_size] * block_size + position % block_size for position in (4, 5)]
        assert slots[group].tolist() == [*two, group * block_size + 3, PAD_SLOT_ID]


@without_triton
@pytest.mark.usefixtures("worker_buffers")
def test_vllms_request_state_runs_on_the_patched_kernels():
    from vllm.v1.worker.gpu.states import RequestState

    states = RequestState(4, MAX_LEN, 64, SPEC, 100, torch.device("cpu"))
    states.add_request("a", 3, [7, 8, 9], 0, 10)
    states.add_request("b", 1, [5, 6], 1, 10)
    states.apply_staged_writes()
    a, b = states.req_id_to_index["a"], states.req_id_to_index["b"]
    assert states.all_token_ids.gpu[a, :3].tolist() == [7, 8, 9]
    assert states.all_token_ids.gpu[b, :2].tolist() == [5, 6]
    assert (states.total_len.gpu[a], states.total_len.gpu[b]) == (3, 2)
    assert (states.num_computed_tokens.gpu[a], states.num_computed_tokens.gpu[b]) == (0, 1)


@without_triton
@pytest.mark.usefixtures("worker_buffers")
@logit_types
@pytest.mark.parametrize("num_logprobs", [0, 4, 50])
@pytest.mark.parametrize("num_rows", [0, 1, 40])
def test_vllms_topk_scores_run_on_the_patched_kernels(dtype, num_logprobs, num_rows):
    from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores

    vocab = 50
    generator = torch.Generator().manual_seed(num_rows)
    logits = torch.randn(num_rows, vocab, generator=generator).to(dtype)
    sampled = torch.randint(vocab, (num_rows,), generator=generator)
    scores = compute_topk_scores(logits, num_logprobs, sampled)

    logprobs = torch.log_softmax(logits.float(), dim=-1)
    own = logprobs.gather(-1, sampled[:, None])
    top = logprobs.topk(num_logprobs, dim=-1).values
    assert scores.logprob_token_ids[:, 0].tolist() == sampled.tolist()
    torch.testing.assert_close(scores.logprobs, torch.cat((own, top), dim=1), rtol=0, atol=1e-6)
    torch.testing.assert_close(scores.logprobs, logprobs.gather(-1, scores.logprob_token_ids), rtol=0, atol=1e-6)
    ranks = [sum(logit >= row[token] for logit in row) for row, token in zip(logits.tolist(), sampled, strict=True)]
    assert scores.selected_token_ranks.tolist() == ranks


@without_triton
@pytest.mark.usefixtures("worker_buffers")
def test_vllms_prompt_logprobs_run_on_the_patched_kernels():
    """Two prompts, one in its second chunk and as long as the table; then their tokens' scores."""
    from vllm.v1.worker.gpu.sample.prompt_logprob import (
        compute_prompt_logprobs_with_chunking,
        get_prompt_logprobs_token_ids,
    )

    all_tokens = tensor([[7, 8, 9, 0, 0], [1] * 5, [2, 3, 4, 5, 6]])
    token_ids = get_prompt_logprobs_token_ids(
        6, tensor([0, 3, 6, 6]), tensor([2, 0], torch.int64), tensor([0, 0, 2]), all_tokens
    )
    assert token_ids.tolist() == [5, 6, 0, 8, 9, 0]

    logits = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)).bfloat16()
    ids, logprobs, ranks = compute_prompt_logprobs_with_chunking(token_ids, logits, lambda rows: rows, 2)
    assert ids[:, 0].tolist() == token_ids.tolist()
    torch.testing.assert_close(logprobs, torch.log_softmax(logits.float(), -1).gather(-1, ids), rtol=0, atol=1e-6)
    assert ranks.tolist() == (logits >= logits.gather(-1, ids[:, :1])).sum(dim=1).tolist()
