"""The rows that one tower runs in a pass."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass
class TowerRows:
    """Rows of one tower, still on the host: for row i, ``lengths[i]`` tokens from position ``starts[i]`` on.

    ``batch_rows`` (n,) are the rows of vLLM's batch they belong to.
    """

    batch_rows: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.batch_rows)

    def take(self, index: np.ndarray) -> TowerRows:
        """Some of the rows, or all in another order."""
        return TowerRows(self.batch_rows[index], self.starts[index], self.lengths[index])

    @cached_property
    def query_start_loc(self) -> np.ndarray:
        """(n + 1,): where each row's tokens begin."""
        return np.concatenate(([0], np.cumsum(self.lengths)))

    def tokens_of(self, index: np.ndarray) -> np.ndarray:
        """Where the tokens of the rows ``index`` (m,) lie among those of all, row after row."""
        lengths = self.lengths[index]
        offsets = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return np.repeat(self.query_start_loc[:-1][index], lengths) + offsets

    @property
    def num_tokens(self) -> int:
        return int(self.query_start_loc[-1])

    @property
    def ends(self) -> np.ndarray:
        """(n,): the position behind each row's last token."""
        return self.starts + self.lengths
