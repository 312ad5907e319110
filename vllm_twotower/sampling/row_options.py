"""Options of a step's rows as tensors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class RowOptions:
    """Options of R rows, gathered from the request table; each tensor is (R,).

    ``noise_schedule`` and ``remasking`` are indices into ``NOISE_SCHEDULES`` and ``REMASKING_SCORES`` of
    :mod:`~vllm_twotower.sampling.strategies`.
    """

    max_steps: Tensor
    confidence_threshold: Tensor
    noise_schedule: Tensor
    adaptive_unmasking: Tensor
    remasking: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor

    def rows(self, index: Tensor) -> RowOptions:
        """The options of some rows, in the order of ``index``; each is gathered when it is first asked for."""
        return _SomeRows(self, index)


class _SomeRows(RowOptions):
    def __init__(self, options: RowOptions, index: Tensor):
        self._options, self._index = options, index

    def __getattr__(self, name: str) -> Tensor:
        if name not in RowOptions.__dataclass_fields__:
            raise AttributeError(name)
        column = getattr(self._options, name)[self._index]
        setattr(self, name, column)
        return column
