"""What a step's rows do, pass by pass, without a model: which tokens each tower reads and when a row is done."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")
from vllm_twotower.engine.pass_buffers import PassBuffers
from vllm_twotower.engine.report import Report
from vllm_twotower.engine.step_rows import StepRows
from vllm_twotower.engine.tower_rows import TowerRows
from vllm_twotower.options import AUTO_PASSES_PER_STEP

WIDTH, MAX_LEN, PAGE = 16, 1000, 128
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]


def step(*rows: dict[str, Any], interval: int = MAX_LEN, limit: int | str = "auto") -> StepRows:
    """Rows of requests with the slots 0, 1, ..."""

    def column(name: str, default: Any = 0) -> np.ndarray:
        return np.array([row.get(name, default) for row in rows])

    table = SimpleNamespace(
        read=column("read"),
        width=column("width", WIDTH),
        is_ar=column("is_ar", False),
        is_auto=column("is_auto", False),
        starts_with_ar=column("starts_with_ar", False),
        verifies=column("verifies", False),
        has_grammar=column("has_grammar", False),
        max_model_len=MAX_LEN,
        engine=SimpleNamespace(canvas_length=WIDTH, denoise_steps_per_engine_step=limit),
    )
    columns = (column("computed"), column("scheduled"), column("drafts"), column("prefill"), column("max_len", MAX_LEN))
    return StepRows(np.arange(len(rows)), *columns, table, interval, PAGE)


def context(rows: StepRows) -> list[tuple[int, int, int, bool]]:
    """The context tower's rows of the next pass: row, start, length, whether a token is chosen."""
    taken, gets_token = rows.take_context()
    columns = (taken.batch_rows, taken.starts, taken.lengths, gets_token)
    return [(int(a), int(b), int(c), bool(d)) for a, b, c, d in zip(*columns, strict=True)]


def canvases(rows: StepRows) -> list[tuple[int, int, int]]:
    taken = rows.take_canvases()
    return [tuple(map(int, row)) for row in zip(taken.batch_rows, taken.starts, taken.lengths, strict=True)]


def test_prompts() -> None:
    """A chunk is read whole; behind the last one the first block is filled, by either tower."""
    rows = step(
        {"computed": 0, "scheduled": 50, "prefill": 80},
        {"computed": 50, "scheduled": 30, "prefill": 80},
        {"computed": 0, "scheduled": 30, "prefill": 30, "is_ar": True},
    )
    assert context(rows) == [(0, 0, 50, False), (1, 50, 30, False), (2, 0, 30, True)]
    assert canvases(rows) == [(1, 80, WIDTH)]
    assert rows.waits.tolist() == [True, False, False]
    rows.add_tokens(np.array([2]), np.array([1]), np.array([False]))
    assert context(rows) == [(2, 30, 1, True)]
    assert canvases(rows) == [(1, 80, WIDTH)]
    assert not rows.done.any()
    rows.add_canvases(np.array([1]))
    rows.add_tokens(np.array([2]), np.array([1]), np.array([True]))  # a stop token
    assert rows.is_over_after(2)
    assert rows.unread.tolist() == [0, WIDTH, 1]
    assert (rows.num_new.tolist(), rows.context_passes.tolist()) == ([0, WIDTH, 2], [1, 1, 2])
    assert rows.denoiser_passes.tolist() == [0, 2, 0]


def test_what_was_returned_is_read_first() -> None:
    """A block of sixteen tokens or a single one, whichever tower goes on; one-token rows come first."""
    rows = step(
        {"computed": 96, "read": 80, "scheduled": WIDTH, "drafts": WIDTH, "prefill": 80},
        {"computed": 96, "read": 80, "scheduled": 1, "drafts": 1, "prefill": 80, "is_auto": True},
        {"computed": 96, "read": 95, "scheduled": WIDTH, "drafts": WIDTH, "prefill": 80, "is_auto": True},
    )
    assert context(rows) == [(2, 95, 1, False), (0, 80, 16, False), (1, 80, 16, True)]
    assert canvases(rows) == [(0, 96, WIDTH), (2, 96, WIDTH)]


def test_states_are_kept_where_they_are_cached() -> None:
    """The context tower stops there, and the row goes on in the next pass."""
    rows = step({"computed": 136, "read": 120, "scheduled": WIDTH, "drafts": WIDTH, "prefill": 90}, interval=PAGE)
    assert context(rows) == [(0, 120, 8, False)]
    assert canvases(rows) == []
    assert context(rows) == [(0, 128, 8, False)]
    assert canvases(rows) == [(0, 136, WIDTH)]


@pytest.mark.parametrize(
    ("row", "room"),
    [
        ({"computed": 100, "scheduled": 1, "drafts": 1}, WIDTH),
        ({"computed": 100, "scheduled": 1, "drafts": 1, "max_len": 103}, 3),
        ({"computed": MAX_LEN - 2, "scheduled": 1, "drafts": 1, "max_len": 2 * MAX_LEN}, 2),
        ({"computed": PAGE - 3, "scheduled": 1, "drafts": 1}, 4),  # the scheduled token is the page's third but last
        ({"computed": PAGE, "scheduled": 1, "drafts": 1}, WIDTH),
        ({"computed": 0, "scheduled": PAGE, "prefill": PAGE}, 1),  # there is no slot for the state behind the page yet
        ({"computed": 0, "scheduled": PAGE - 3, "prefill": PAGE - 3}, 4),
        ({"computed": 100, "scheduled": 1, "has_grammar": True}, 1),
    ],
)
def test_room_of_the_context_towers_blocks(row: dict[str, Any], room: int) -> None:
    assert step({"is_ar": True, **row}).room.tolist() == [room]


def test_canvases_are_denoised_whole_or_not_at_all() -> None:
    rows = step(
        {"computed": 96, "read": 96, "scheduled": 15, "drafts": 15, "prefill": 80},
        {"computed": MAX_LEN - 5, "read": MAX_LEN - 5, "scheduled": 5, "drafts": 5, "prefill": 80},
        {"computed": 96, "read": 96, "scheduled": 7, "drafts": 7, "prefill": 80, "width": 7},
    )
    assert context(rows) == []
    assert canvases(rows) == [(1, MAX_LEN - 5, 5), (2, 96, 7)]
    assert rows.waits.tolist() == [True, False, False]


AR_ROW = {"computed": 100, "read": 99, "scheduled": 1, "drafts": 1, "is_ar": True}
CHUNK = {"computed": 0, "scheduled": 20, "prefill": 20}


def test_how_long_a_step_goes_on() -> None:
    """The context tower fills the block of one row in a step, of several a token each; or as many as are asked."""
    assert [step(*[AR_ROW] * count).max_passes for count in (1, 2, 16)] == [WIDTH, 1, 1]
    assert step(AR_ROW, CHUNK).max_passes == 1
    assert step(CHUNK, CHUNK).max_passes == AUTO_PASSES_PER_STEP
    assert step(AR_ROW, AR_ROW, limit=3).max_passes == 3


@pytest.mark.parametrize("limit", ["auto", 3])
def test_a_row_that_is_done_ends_the_step_by_default(limit: int | str) -> None:
    rows = step(AR_ROW, AR_ROW, limit=limit)
    rows.take_context()
    rows.add_tokens(np.array([0, 1]), np.array([1, 1]), np.array([False, False]))
    assert rows.is_over_after(1) == (limit == "auto")
    rows.take_context()
    rows.add_tokens(np.array([0, 1]), np.array([1, 1]), np.array([True, False]))
    assert rows.is_over_after(2) == (limit == "auto")
    assert rows.is_over_after(3)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_on_the_device(device: str) -> None:
    """At the same addresses in every pass."""
    buffers, addresses = PassBuffers(4, 4, torch.device(device)), set()
    for first in (3, 40):
        rows = step(
            {"computed": first, "scheduled": 2, "prefill": 90},
            {"computed": 9, "read": 9, "scheduled": 7, "drafts": 7, "width": 7},
            {"computed": first, "scheduled": 3, "prefill": 90},
            {"computed": 30, "read": 30, "scheduled": WIDTH, "drafts": WIDTH},
        )
        taken = rows.take_context()[0]
        read, _, denoised = buffers.send(rows.slots + 5, taken, rows.take_drafts(), rows.take_canvases())
        assert read.slots.tolist() == [5, 7]
        assert read.row.tolist() == [0, 0, 1, 1, 1]
        assert read.positions.tolist() == [first, first + 1, first, first + 1, first + 2]
        assert (denoised.batch_rows.tolist(), denoised.lengths.tolist()) == ([1, 3], [7, WIDTH])
        # A page of eight tokens has the number of its place in the table.
        pages = torch.arange(8, device=device).repeat(len(denoised), 1)
        placed = denoised.slot_mapping(pages, 8).view(2, WIDTH).tolist()
        assert placed[0] == [*range(9, 16), *[-1] * (WIDTH - 7)]
        assert placed[1] == list(range(30, 30 + WIDTH))
        addresses.add((read.slots.data_ptr(), denoised.starts.data_ptr()))
    assert len(addresses) == 1


def test_rows_of_a_bucket() -> None:
    """Those that fill it up have no tokens: they are written nowhere, and no page is theirs."""
    rows = step({"computed": 30, "read": 29, "scheduled": 1, "drafts": 1, "is_ar": True})
    taken = rows.take_context()[0]
    buffers = PassBuffers(4, 4, torch.device("cpu"))
    buckets = ((3, 1), None, (2, WIDTH))
    read, _, denoised = buffers.send(rows.slots, taken, rows.take_drafts(), rows.take_canvases(), buckets)
    tables = read.block_tables([torch.full((1, 8), 5)])
    assert (len(read), read.lengths.tolist()) == (3, [1, 0, 0])
    assert read.slots.tolist() == [0, 4, 4]
    assert tables[0].tolist() == [[5] * 8, [0] * 8, [0] * 8]
    assert read.slot_mapping(tables[0], 8).tolist() == [5 * 8 + 29 % 8, -1, -1]
    assert (denoised.lengths.tolist(), denoised.num_tokens) == ([0, 0], 2 * WIDTH)


def test_reports_arrive() -> None:
    rows = step(
        {"computed": 96, "read": 80, "scheduled": WIDTH, "drafts": WIDTH, "prefill": 80},
        {"computed": 96, "read": 95, "scheduled": 1, "drafts": 1, "prefill": 80, "is_ar": True},
    )
    rows.take_context()
    rows.take_canvases()
    packed = Report.pack(rows, np.array([True, False])).tolist()
    reports = [Report(1, 1, WIDTH, 0), Report(1, 0, 1, 0, is_finite=False)]
    assert [Report.unpack(number) for number in packed] == reports


VERIFIED = {"computed": 100, "read": 99, "scheduled": WIDTH, "drafts": WIDTH, "prefill": 80, "verifies": True}


def taken(rows: TowerRows) -> list[tuple[int, int, int]]:
    return [tuple(map(int, row)) for row in zip(rows.batch_rows, rows.starts, rows.lengths, strict=True)]


@pytest.mark.parametrize("limit", ["auto", 1])
def test_drafts_are_verified_in_the_step_that_makes_them(limit: int | str) -> None:
    """Whatever a row beside them waits for. What is read is what was accepted, the token before it among it."""
    rows = step(
        VERIFIED, AR_ROW, VERIFIED | {"width": 9, "scheduled": 9, "drafts": 9}, CHUNK | {"verifies": True}, limit=limit
    )
    assert rows.max_passes == 1
    assert context(rows) == [(1, 99, 1, True), (3, 0, 20, True)]
    assert taken(rows.take_drafts()) == []
    assert canvases(rows) == [(0, 99, WIDTH), (2, 99, 9)]
    rows.add_tokens(np.array([1, 3]), np.array([1, 1]), np.array([False, False]))
    rows.add_canvases(np.array([0]))
    assert not rows.is_over_after(1)
    assert context(rows) == [(1, 100, 1, True)]
    assert taken(rows.take_drafts()) == [(0, 99, WIDTH)]
    assert canvases(rows) == [(2, 99, 9)]
    rows.add_tokens(np.array([0]), np.array([5]), np.array([False]))
    rows.add_canvases(np.array([2]))
    assert not rows.is_over_after(2)
    context(rows)
    assert taken(rows.take_drafts()) == [(2, 99, 9)]
    rows.add_tokens(np.array([2]), np.array([1]), np.array([False]))
    assert rows.is_over_after(3)
    assert rows.num_new.tolist()[::2] == [5, 1]
    assert (rows.read.tolist()[::2], rows.unread.tolist()[::2]) == ([104, 100], [1, 1])
    assert rows.num_rejected.tolist()[::2] == [WIDTH - 5, 9 - 1]
    first = Report.unpack(Report.pack(rows, torch.ones(4, dtype=torch.bool)).tolist()[0])
    assert first == Report(1, 1, WIDTH, 1, 4)


@pytest.mark.parametrize(
    ("row", "room"),
    [
        ({}, WIDTH),
        ({"width": 7, "scheduled": 7, "drafts": 7}, 7),
        ({"max_len": 103}, 3),
        ({"max_len": 101}, 1),
        ({"computed": PAGE - 3, "read": PAGE - 4}, 4),
        ({"computed": PAGE, "read": PAGE - 1}, 1),  # the newest token is the last of its page
        ({"computed": PAGE + 1, "read": PAGE}, WIDTH),
        ({"computed": MAX_LEN - 2, "read": MAX_LEN - 3, "scheduled": 2, "drafts": 2, "max_len": 2 * MAX_LEN}, 2),
        ({"scheduled": 15, "drafts": 15}, 0),
        ({"is_auto": True}, WIDTH),
        ({"is_auto": True, "scheduled": 1, "drafts": 1}, WIDTH),  # by the context tower alone
        ({"computed": 0, "scheduled": 20, "drafts": 0, "prefill": 20}, 1),
    ],
)
def test_room_of_verified_blocks(row: dict[str, Any], room: int) -> None:
    """They end with a page; where that leaves one token, or a prompt was read, the context head gives it."""
    rows = step(VERIFIED | row)
    assert rows.room.tolist() == [room]
    assert rows.is_ar.tolist() == [room == 1 or row.get("drafts") == 1]
    assert rows.is_verified.tolist() == [not rows.is_ar[0]]
