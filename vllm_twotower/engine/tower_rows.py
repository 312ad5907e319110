"""The rows that one tower runs in an engine step."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np


@dataclass
class TowerRows:
    """Rows of one tower, still on the host: for row i, ``lengths[i]`` tokens from position ``starts[i]`` on.

    ``batch_rows`` (n,) are the rows of vLLM's batch they belong to; ``sources`` (n,) where their tokens lie.
    """

    batch_rows: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    sources: np.ndarray

    def __len__(self) -> int:
        return len(self.batch_rows)

    def take(self, order: np.ndarray | slice) -> TowerRows:
        """Some of the rows, or all in another order."""
        return TowerRows(*(getattr(self, name)[order] for name in _COLUMNS))

    @cached_property
    def query_start_loc(self) -> np.ndarray:
        """(n + 1,) int32: where each row's tokens begin."""
        bounds = np.zeros(len(self) + 1, dtype=np.int32)
        np.cumsum(self.lengths, out=bounds[1:])
        return bounds

    @property
    def num_tokens(self) -> int:
        return int(self.query_start_loc[-1])

    @property
    def seq_lens(self) -> np.ndarray:
        return self.starts + self.lengths

    @cached_property
    def row_of_token(self) -> np.ndarray:
        """(T,): the row each token belongs to."""
        return np.repeat(np.arange(len(self)), self.lengths)

    @cached_property
    def offsets(self) -> np.ndarray:
        """(T,): each token's place in its row."""
        return np.arange(self.num_tokens) - self.query_start_loc[:-1][self.row_of_token]

    def spread(self, firsts: np.ndarray) -> np.ndarray:
        """(T,): ``firsts[i], firsts[i] + 1, ...`` for the tokens of row i."""
        return firsts[self.row_of_token] + self.offsets


_COLUMNS = tuple(field.name for field in fields(TowerRows))
