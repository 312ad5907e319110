"""What is traced of requests: noted in the worker pass by pass, sent with the step that returns the tokens."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from vllm_twotower.trace import LEVELS, BlockTrace, DiffusionTrace

from .tower_rows import TowerRows

_NONE, _PASSES = LEVELS.index("none"), LEVELS.index("passes")
_NO_DRAFT = -1
_HEADER = 4
_NOTHING = np.zeros(0, dtype=np.int64)


class ReturnedRows(Protocol):
    """Of the R rows of a step, see :class:`~.step_rows.StepRows`: their slots, and how many tokens came, and how."""

    slots: np.ndarray
    is_ar: np.ndarray
    is_verified: np.ndarray
    room: np.ndarray
    num_new: np.ndarray

    def __len__(self) -> int: ...


class TraceTable:
    """What is known of the canvases of traced requests so far, on the host, a row for each slot.

    ``is_traced`` (slots,) says which requests are. A preempted request starts its block again, and its notes with it.
    """

    def __init__(self, num_slots: int, canvas_length: int, no_request: int):
        self._level = np.full(num_slots, _NONE)
        self.is_traced = self._level > _NONE
        self.is_traced[no_request] = True  # what a captured pass does depends on no request
        shape = (num_slots, 2, canvas_length)
        self._num_passes = np.zeros(num_slots, dtype=np.int64)
        self._decided_in = np.zeros((num_slots, canvas_length), dtype=np.int64)
        self._of_canvas, self._of_text = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.float32)
        self._passes: dict[int, list[tuple[float, np.ndarray]]] = {}

    def set(self, slot: int, level: str) -> None:
        """Starts a request."""
        self._level[slot] = LEVELS.index(level)
        self.is_traced[slot] = self._level[slot] > _NONE
        self._forget(np.array([slot]))

    def add_pass(
        self,
        slots: np.ndarray,
        rows: TowerRows,
        canvas: np.ndarray,
        mask: int,
        probabilities: np.ndarray,
        t: np.ndarray,
    ) -> None:
        """Notes a pass of the denoiser over rows (n,) at times t (n,), after which the canvases are (n, S).

        Args: slots (n,); mask, the mask token; probabilities (n, 2, S) fp32, of the tokens and their runners-up.
        """
        traced = np.flatnonzero(self.is_traced[slots])
        slots, canvas, width = slots[traced], canvas[traced], canvas.shape[1]
        self._num_passes[slots] += 1
        is_new = (canvas != mask) & (self._decided_in[slots, :width] == 0)
        row, column = np.nonzero(is_new)
        self._decided_in[slots[row], column] = self._num_passes[slots[row]]
        self._of_canvas[slots[row], :, column] = probabilities[traced[row], :, column]
        for row in np.flatnonzero(self._level[slots] == _PASSES):
            note = float(t[traced[row]]), canvas[row, : rows.lengths[traced[row]]]
            self._passes.setdefault(int(slots[row]), []).append(note)

    def add_tokens(self, slots: np.ndarray, places: np.ndarray, probabilities: np.ndarray) -> None:
        """Notes tokens of the context tower: (n,) slots, places in what the step returns, probabilities (n, 2) fp32."""
        traced = self.is_traced[slots]
        self._of_text[slots[traced], :, places[traced]] = probabilities[traced]

    def collect(self, rows: ReturnedRows) -> np.ndarray | None:
        """What a step returns, (R, K) int64; None if no request is traced that it returns anything to.

        A row has the count of its numbers, and then those that :func:`add_block` reads. Forgets what is returned.
        """
        of_step = np.flatnonzero(self.is_traced[rows.slots] & (rows.num_new > 0))
        if not len(of_step):
            return None
        slots, counts, is_draft = rows.slots[of_step], rows.num_new[of_step], rows.is_verified[of_step]
        is_canvas = ~(rows.is_ar[of_step] | is_draft)
        width = int(counts.max())
        decided_in = self._decided_in[slots, :width]
        decided_in[is_draft, :-1] = decided_in[is_draft, 1:]  # a draft begins with the token before it
        decided_in[np.arange(width) >= np.where(is_canvas, counts, is_draft * (counts - 1))[:, None]] = 0
        of_canvas, of_text = self._of_canvas[slots, :, :width], self._of_text[slots, :, :width]
        bits = np.where(is_canvas[:, None, None], of_canvas, of_text).view(np.int32)
        passes = np.where(is_canvas | is_draft, self._num_passes[slots], 0)
        drafted = np.where(is_draft, rows.room[of_step] - 1, _NO_DRAFT)
        notes = [self._notes(slot) for slot in slots] if self._passes else []
        size = _HEADER + 3 * width
        sizes = np.full_like(counts, size) + ([len(note) for note in notes] or 0)
        found = np.zeros((len(rows), 1 + sizes.max()), dtype=np.int64)
        columns = (sizes, counts, np.full_like(counts, width), passes, drafted, decided_in, bits.reshape(len(bits), -1))
        found[of_step, : 1 + size] = np.column_stack(columns)
        for row, note in zip(of_step, notes, strict=False):
            found[row, 1 + size : 1 + size + len(note)] = note
        self._forget(slots)
        return found

    def _notes(self, slot: int) -> np.ndarray:
        """A block's passes: the time and the canvas of each; nothing where canvases are not asked for."""
        if not (passes := self._passes.get(int(slot))):
            return _NOTHING
        times = np.array([t for t, _ in passes], dtype=np.float32).view(np.int32)
        return np.concatenate([times, *(canvas for _, canvas in passes)])

    def _forget(self, slots: np.ndarray) -> None:
        self._num_passes[slots] = self._decided_in[slots] = 0
        if self._passes:
            for slot in slots.tolist():
                self._passes.pop(slot, None)


def add_block(trace: DiffusionTrace, numbers: Sequence[int]) -> None:
    """Adds to a trace what a step has returned of its request, as :meth:`TraceTable.collect` gives it."""
    count, width, num_passes, drafted = numbers[:_HEADER]
    decided_in, *probabilities = (numbers[_HEADER + i * width :][:count] for i in range(3))
    if num_passes:
        block = BlockTrace(len(trace), count, num_passes)
        if drafted != _NO_DRAFT:
            block.drafted, block.accepted = drafted, count - 1
        if notes := numbers[_HEADER + 3 * width :]:
            times, canvases = notes[:num_passes], notes[num_passes:]
            length = len(canvases) // num_passes
            block.t = _floats(times)
            block.canvases = [list(canvases[start : start + length]) for start in range(0, len(canvases), length)]
        trace.blocks.append(block)
    trace.block += [len(trace.blocks) - 1 if num_passes else None] * count
    trace.decided_in += [number or None for number in decided_in]
    trace.confidence += _floats(probabilities[0])
    trace.runner_up += _floats(probabilities[1])


def _floats(bits: Sequence[int]) -> list[float]:
    """fp32 numbers (n,) of their bits (n,)."""
    return list(struct.unpack(f"{len(bits)}f", struct.pack(f"{len(bits)}i", *bits)))
