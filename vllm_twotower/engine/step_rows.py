"""What each row of vLLM's batch does in an engine step, pass by pass; all of it is decided on the host.

A row is a chunk of a prompt, or a block that is filled: by the context tower from left to right, by the denoiser, or
by both. In every pass a row that has unread tokens lets the context tower read them, and once all are read it goes on:

| row | unread | once all is read |
|---|---|---|
| chunk of a prompt | the chunk | nothing; after a prompt's last one its first block is filled as below |
| block of the context tower | the newest token | the context head gives the next token |
| block of the denoiser | nothing | the denoiser runs over the canvas |
| canvas that was scheduled in part | | nothing: it waits for a step with more room |

In its first pass a block finds more unread, what was returned last: a block of the denoiser, or a token.
Where Mamba states of generated text are cached, the context tower stops, and reads on in the row's next pass.

A block that is verified begins with the newest token, unread. The denoiser drafts what follows it; then the context
tower reads all of it. What it would have given itself is accepted, with one token more, which is unread again. All this
is done in one step, however many passes that may make. After a prompt, and after the last token of a page, the context
head gives one token instead.
"""

from __future__ import annotations

import numpy as np

from vllm_twotower.options import AUTO_PASSES_PER_STEP

from .prefix_cache import next_stop
from .request_table import RequestTable
from .tower_rows import TowerRows


class StepRows:
    """The R rows of a step; arrays (R,).

    ``slots`` are their requests' in the :class:`RequestTable`. Of the ``known`` tokens of a row the context tower has
    ``read`` some; ``num_new`` came in this step, in the place of ``num_drafts``. A row may get ``room`` tokens in this
    step, 0 for one that fills no block; the context tower fills it if the row ``is_ar``, or verifies it if the row
    ``is_verified``, otherwise the denoiser does.
    ``context_passes`` and ``denoiser_passes`` count the runs of the towers over the row. If one of them ran without a
    graph that others have, ``why_eager`` is the number of the reason, counted from 1, in ``EAGER_REASONS``.
    """

    def __init__(
        self,
        slots: np.ndarray,
        num_computed: np.ndarray,
        num_scheduled: np.ndarray,
        num_drafts: np.ndarray,
        prefill_len: np.ndarray,
        max_len: np.ndarray,
        table: RequestTable,
        commit_interval: int,
        state_block_size: int,
    ):
        """The rows before the first pass; arrays (R,) as vLLM's batch has them.

        Drafts stand for tokens to come: as many as the denoiser's canvas has positions, or one for any number of
        tokens from the context tower, which then fills up to a canvas length. Without one it gives a single token. A
        request ends at ``max_len`` tokens. Of an ``auto`` request the drafts say which tower fills the block.

        The step makes up to ``max_passes``. By default it makes one where the context tower fills blocks of several
        rows: requests of a closed loop come one by one, and a longer step keeps the next one waiting.
        """
        self.slots, self.num_drafts, self._commit_interval = slots, num_drafts, commit_interval
        self.is_chunk = num_computed < prefill_len
        self.known = num_computed + num_scheduled - num_drafts
        self.read = np.where(self.is_chunk, num_computed, table.read[slots])
        self._has_grammar = table.has_grammar[slots]
        one_draft = np.where(self.is_chunk, table.starts_with_ar[slots], num_drafts == 1)
        self.is_ar = table.is_ar[slots] | (table.is_auto[slots] & one_draft)
        width, to_come = table.width[slots], np.minimum(max_len, table.max_model_len) - self.known
        # A state has a slot if the page that it is in has one: that of the last scheduled token, or of a draft's first.
        last, newest = self.known - self.is_chunk, self.known - 1
        after_last, after_newest = (state_block_size - position % state_block_size for position in (last, newest))
        verified = np.minimum(np.minimum(width, after_newest), to_come)
        verifies = table.verifies[slots] & ~self.is_ar
        self.is_verified = verifies & ~self.is_chunk & (verified > 1)
        self.is_ar |= verifies & ~self.is_verified
        tokens = np.minimum(np.minimum(to_come, after_last + ~self.is_chunk), table.engine.canvas_length)
        tokens = np.where(self._has_grammar | verifies, 1, tokens)
        canvas = np.minimum(width, table.max_model_len - self.known)
        fills = np.where(self.is_chunk, self.known >= prefill_len, self.is_ar | (num_drafts == canvas))
        self.room = fills * np.select((self.is_ar, self.is_verified), (tokens, verified), canvas)
        self._is_drafted = np.zeros(len(slots), dtype=bool)
        self.num_new = np.zeros_like(slots)
        self.context_passes, self.denoiser_passes = np.zeros_like(slots), np.zeros_like(slots)
        self.why_eager = np.zeros_like(slots)
        self._runs = self.is_chunk | fills
        self.ends_with_first = table.engine.denoise_steps_per_engine_step == "auto"
        if table.engine.denoise_steps_per_engine_step != "auto":
            self.max_passes = table.engine.denoise_steps_per_engine_step
        else:
            several = self.is_ar.any() and len(slots) > 1
            self.max_passes = 1 if several else table.engine.canvas_length if self.is_ar.any() else AUTO_PASSES_PER_STEP

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def unread(self) -> np.ndarray:
        return self.known - self.read

    @property
    def num_rejected(self) -> np.ndarray:
        """How many of its drafts vLLM is to take off what it counts as computed of a row; it is then all that is known.

        Only the token of a request with a grammar is computed in the next step.
        """
        return np.where(self._has_grammar, 0, self.num_drafts - self.num_new)

    @property
    def computed_unread(self) -> np.ndarray:
        """The last tokens that vLLM then counts as computed, though the context tower has yet to read them."""
        return self.unread - np.where(self._has_grammar, self.num_new, 0)

    @property
    def num_accepted(self) -> np.ndarray:
        """The tokens of drafts that were accepted; -1 where none was verified."""
        return np.where(self.is_verified, self.num_new - 1, -1)

    @property
    def waits(self) -> np.ndarray:
        """The rows that further passes of this step do nothing for."""
        return self.room == 0

    def take_context(self) -> tuple[TowerRows, np.ndarray]:
        """The context tower's rows (n,) of the next pass, which count as read; and which (n,) get a next token.

        Those that it verifies are not among them, see :meth:`take_drafts`.
        """
        rows = np.flatnonzero(self._runs & ~self.is_verified & (self.unread > 0))
        starts, is_chunk = self.read[rows], self.is_chunk[rows] & (self.context_passes[rows] == 0)
        stops = np.where(is_chunk, self.known[rows], next_stop(starts, self._commit_interval))
        context = TowerRows(rows, starts, np.minimum(self.known[rows], stops) - starts)
        is_decode = (context.lengths == 1) & (context.starts > 0)
        if not is_decode.all():
            # vLLM's Mamba metadata takes one-token rows with a state for decodes, which come first (mamba_attn.py).
            context = context.take(np.argsort(~is_decode, kind="stable"))
        self.read[context.batch_rows] += context.lengths
        self.context_passes[rows] += 1
        self._runs &= self.room > 0
        gets_token = self._runs & self.is_ar & (self.unread == 0)
        return context, gets_token[context.batch_rows]

    def take_drafts(self) -> TowerRows:
        """The drafts that the context tower verifies in the next pass; what is read :meth:`add_tokens` says then."""
        rows = np.flatnonzero(self._runs & self._is_drafted)
        self.context_passes[rows] += 1
        return TowerRows(rows, self.read[rows], self.room[rows])

    def take_canvases(self) -> TowerRows:
        """The denoiser's rows of the next pass, after :meth:`take_context` and :meth:`take_drafts`."""
        starts = np.where(self.is_verified, self.read, self.known)
        is_next = np.where(self.is_verified, ~self._is_drafted, self.unread == 0)
        rows = np.flatnonzero(self._runs & ~self.is_ar & is_next)
        self.denoiser_passes[rows] += 1
        return TowerRows(rows, starts[rows], self.room[rows])

    def add_tokens(self, rows: np.ndarray, counts: np.ndarray, ends: np.ndarray) -> None:
        """Counts new tokens of rows (n,); those that are full, verified, or where it ``ends`` (n,), are done."""
        is_verified = self.is_verified[rows]
        self.read[rows] += counts * is_verified
        self.known[rows] += counts
        self.num_new[rows] += counts
        self._runs[rows] &= ~(ends | is_verified | (self.num_new[rows] >= self.room[rows]))

    def add_canvases(self, rows: np.ndarray) -> None:
        """Counts canvases (n,) that are whole: their tokens are new, but for drafts, which are to be verified."""
        self._is_drafted[rows] = self.is_verified[rows]
        rows = rows[~self.is_verified[rows]]
        self.add_tokens(rows, self.room[rows], np.ones(len(rows), dtype=bool))

    @property
    def done(self) -> np.ndarray:
        """The rows that have got what they can get in this step."""
        return (self.room > 0) & ~self._runs

    def is_over_after(self, passes: int) -> bool:
        """Whether the step ends after so many passes.

        By default it does as soon as a row has got what it can, which its request waits for, or cannot get anything.
        It does not before drafts are verified.
        """
        if (self._runs & self.is_verified).any():
            return False
        if passes >= self.max_passes or not self._runs.any():
            return True
        return self.ends_with_first and bool(self.waits.any() or self.done.any())
