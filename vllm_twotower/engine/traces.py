"""What is traced of requests: noted in the worker pass by pass, sent with the step that returns the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from vllm_twotower.trace import LEVELS, BlockTrace, DiffusionTrace

if TYPE_CHECKING:
    from .step_rows import StepRows
    from .tower_rows import TowerRows

_NONE, _PASSES = LEVELS.index("none"), LEVELS.index("passes")
_NO_DRAFT = -1
_HEADER = 5


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

    def collect(self, rows: StepRows) -> np.ndarray | None:
        """What a step returns, (R, K) int64; None if no request is traced that it returns anything to.

        A row has the count of its numbers, and then those that :func:`add_block` reads. Forgets what is returned.
        """
        of_step = np.flatnonzero(self.is_traced[rows.slots] & (rows.num_new > 0))
        if not len(of_step):
            return None
        packed = [self._packed(rows, row) for row in of_step]
        found = np.zeros((len(rows), 1 + max(map(len, packed))), dtype=np.int64)
        for row, numbers in zip(of_step, packed, strict=True):
            found[row, 0], found[row, 1 : 1 + len(numbers)] = len(numbers), numbers
        self._forget(rows.slots[of_step])
        return found

    def _packed(self, rows: StepRows, row: int) -> np.ndarray:
        slot, count = rows.slots[row], rows.num_new[row]
        is_draft, is_canvas = bool(rows.is_verified[row]), not (rows.is_ar[row] or rows.is_verified[row])
        decided_in, drafted = np.zeros(count, dtype=np.int64), _NO_DRAFT
        if is_canvas:
            decided_in = self._decided_in[slot, :count]
        elif is_draft:  # whose canvas begins with the token before it
            decided_in[:-1], drafted = self._decided_in[slot, 1:count], rows.room[row] - 1
        probabilities = (self._of_canvas if is_canvas else self._of_text)[slot, :, :count]
        passes = self._passes.get(int(slot), []) if is_draft or is_canvas else []
        times = np.array([t for t, _ in passes], dtype=np.float32)
        canvases = [canvas for _, canvas in passes]
        of_block = self._num_passes[slot] if is_draft or is_canvas else 0
        header = (count, of_block, drafted, len(passes), len(canvases[0]) if canvases else 0)
        bits = (probabilities.ravel().view(np.int32), times.view(np.int32))
        return np.concatenate((header, decided_in, *bits, *canvases))

    def _forget(self, slots: np.ndarray) -> None:
        self._num_passes[slots] = self._decided_in[slots] = 0
        if self._passes:
            for slot in slots.tolist():
                self._passes.pop(slot, None)


def add_block(trace: DiffusionTrace, numbers: Sequence[int]) -> None:
    """Adds to a trace what a step has returned of its request, as :meth:`TraceTable.collect` gives it."""
    count, num_passes, drafted, num_canvases, width = numbers[:_HEADER]
    sizes = (_HEADER, count, 2 * count, num_canvases, num_canvases * width)
    _, decided_in, probabilities, times, canvases, _ = np.split(np.array(numbers), np.cumsum(sizes))
    confidence, runner_up = _floats(probabilities).reshape(2, count).tolist()
    block = BlockTrace(len(trace), count, num_passes)
    if drafted != _NO_DRAFT:
        block.drafted, block.accepted = drafted, count - 1
    if num_canvases:
        block.t, block.canvases = _floats(times).tolist(), canvases.reshape(num_canvases, width).tolist()
    trace.block += [len(trace.blocks) if num_passes else None] * count
    trace.decided_in += [number or None for number in decided_in.tolist()]
    trace.confidence += confidence
    trace.runner_up += runner_up
    if num_passes:
        trace.blocks.append(block)


def _floats(bits: np.ndarray) -> np.ndarray:
    """fp32 numbers (n,) of their bits (n,), int64."""
    return bits.astype(np.int32).view(np.float32)
