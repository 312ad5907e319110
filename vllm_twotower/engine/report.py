"""What the worker tells the scheduler of each row of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .step_rows import StepRows

_BITS = 12
_MASK = (1 << _BITS) - 1


@dataclass(frozen=True)
class Report:
    """What became of one row: ``context_passes`` and ``denoiser_passes``, the latter over ``width`` positions.

    Of the tokens that vLLM counts as computed the context tower has yet to read the last ``unread``. Of a draft
    ``num_accepted`` tokens were accepted; -1 without a draft. If a pass ran without a CUDA graph though the engine has
    them, ``why_eager`` says why, see :class:`~.step_rows.StepRows`. The logits its tokens were chosen by may not have
    been ``is_finite``. The ``trace`` is what :func:`~.traces.add_block` reads.

    vLLM carries one number a row from the worker to the scheduler, the count of NaN logits; a report is packed into it,
    12 bits for each count and 3 for the reason. Where requests are traced there are more numbers a row.
    """

    context_passes: int = 0
    denoiser_passes: int = 0
    width: int = 0
    unread: int = 0
    num_accepted: int = -1
    why_eager: int = 0
    is_finite: bool = True
    trace: Sequence[int] = ()

    @staticmethod
    def pack(rows: StepRows, is_finite: np.ndarray, traces: np.ndarray | None = None) -> np.ndarray:
        """(R,) int64, bitwise complements, which are negative, where not ``is_finite`` (R,).

        With ``traces`` (R, K) int64, see :meth:`~.traces.TraceTable.collect`, (R, 1 + K).
        """
        width = np.where(rows.is_ar, 1, rows.room)
        packed = rows.why_eager
        for count in (
            rows.context_passes,
            rows.denoiser_passes,
            width,
            rows.computed_unread,
            rows.num_accepted + 1,
        ):
            packed = packed << _BITS | count
        packed = np.where(is_finite, packed, ~packed)
        return packed if traces is None else np.concatenate((packed[:, None], traces), 1)

    @classmethod
    def unpack(cls, numbers: int | list[int]) -> Report:
        """The reverse of :meth:`pack`, of one row."""
        number, size, *trace = numbers if isinstance(numbers, list) else (numbers, 0)
        is_finite, number = number >= 0, max(number, ~number)
        context, denoiser, width, unread, accepted = (number >> _BITS * place & _MASK for place in (4, 3, 2, 1, 0))
        return cls(context, denoiser, width, unread, accepted - 1, number >> _BITS * 5, is_finite, tuple(trace[:size]))
