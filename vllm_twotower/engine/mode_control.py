"""How ``diffusion_mode: auto`` chooses, block by block, how it is filled: in the mode that was measured to be faster.

Requests choose between ``ar`` and ``mask_diffusion``, or between ``ar`` and ``verified`` if their text is not to depend
on the choice. Seconds and tokens of the engine's own steps are added up for every mode, apart for 1, 2, 3 to 4, 5 to 8,
... blocks in a step. Where a mode has hardly been measured it is tried, and the slower one again from time to time; but
nothing is tried under a load that has only just come about, for most such loads are gone within a step or two.

Steps that read no prompt are the better measure. Where there are too few of them, all steps count: a prompt takes as
long in either mode, and those of many short texts come so steadily that they even out.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from vllm.logger import init_logger

logger = init_logger(__name__)

BlockMode = Literal["ar", "mask_diffusion", "verified"]
BLOCK_MODES: tuple[BlockMode, ...] = ("ar", "mask_diffusion", "verified")

MARGIN = 0.04
"""The mode changes if the other was faster by more than this share,"""
MIN_DWELL = 16
"""and not before so many decisions, at most one a step: while it changes, steps run both towers."""
BLOCKS_TO_TRY = 8
"""Blocks of a single row that a mode is measured for before it is compared; one less each time that rows double."""
BLOCKS_TO_SETTLE = 2.0
"""Blocks of every row that a load must have lasted before modes are tried under it."""
FORGET = 0.02
"""Share of their weight that older steps lose with each block of a row."""
BLOCKS_BETWEEN_TRIES = 256
"""Blocks of every row after which the slower mode is measured again, if it is not slower by more than"""
HOPELESS = 2.0
"""this factor."""


@dataclass(frozen=True)
class ModeDecision:
    """A mode, why, and the measured ``seconds`` for one block of every open request in either mode, 0 if unknown."""

    mode: BlockMode
    reason: str
    seconds: Mapping[BlockMode, float]


class _Measured:
    """Seconds and tokens of a mode's steps with about as many rows; ``blocks`` of each row were filled since then in
    the other mode, and ``blocks_left`` are to be measured before the two are compared."""

    def __init__(self, blocks_to_try: float) -> None:
        self.seconds = self.tokens = self.blocks = 0.0
        self.blocks_left = self._blocks_to_try = blocks_to_try

    def add(self, seconds: float, tokens: int, blocks: float) -> None:
        keep = (1 - FORGET) ** blocks
        self.seconds, self.tokens = keep * self.seconds + seconds, keep * self.tokens + tokens
        self.blocks_left -= blocks

    def try_again(self) -> None:
        """Asks for new steps, beside which the old ones weigh little."""
        self.seconds, self.tokens = 0.1 * self.seconds, 0.1 * self.tokens
        self.blocks, self.blocks_left = 0.0, self._blocks_to_try

    @property
    def seconds_per_token(self) -> float:
        return self.seconds / self.tokens if self.tokens else 0.0


class _ByLoad(dict[tuple[int, BlockMode], _Measured]):
    """What is measured of a mode, by the bucket of the number of rows."""

    def __missing__(self, key: tuple[int, BlockMode]) -> _Measured:
        self[key] = measured = _Measured(max(2.0, BLOCKS_TO_TRY - key[0]))
        return measured


@dataclass
class _Choice:
    """What was decided last between ``ar`` and another mode, in step ``decided_in``."""

    other: BlockMode
    decision: ModeDecision
    decided_in: int = -1
    since_change: int = MIN_DWELL


class ModeControl:
    """The mode that ``auto`` requests go on in when their next block starts."""

    def __init__(self, canvas_length: int):
        self._canvas_length = canvas_length
        self._without_prompts, self._of_all_steps = _ByLoad(), _ByLoad()
        self._started = time.perf_counter()
        self._load, self._blocks_of_load = -1, 0.0
        others: dict[bool, BlockMode] = {False: "mask_diffusion", True: "verified"}
        self._choices = {
            lossless: _Choice(mode, ModeDecision(mode, "nothing is known yet", {})) for lossless, mode in others.items()
        }
        self._num_changes = 0

    def step_starts(self) -> None:
        """Starts the clock."""
        self._started = time.perf_counter()

    def step_ends(self, rows_of_mode: Mapping[BlockMode, int], num_tokens: int, reads_prompts: bool = False) -> None:
        """Takes the seconds of a step in which so many blocks were filled in each mode, and the tokens that came.

        Steps of several modes tell nothing of any.
        """
        seconds = time.perf_counter() - self._started
        modes = [mode for mode in BLOCK_MODES if rows_of_mode.get(mode)]
        if len(modes) != 1:
            return
        rows = rows_of_mode[modes[0]]
        # A step without tokens was worth its share of a block.
        blocks = max(num_tokens / (rows * self._canvas_length), 1 / self._canvas_length)
        self._blocks_of_load += blocks
        for measured in (self._of_all_steps,) if reads_prompts else (self._of_all_steps, self._without_prompts):
            measured[_bucket(rows), modes[0]].add(seconds, num_tokens, blocks)
            for mode in BLOCK_MODES:
                if mode not in modes:
                    measured[_bucket(rows), mode].blocks += blocks

    def choose(self, step: int, num_open: int, lossless: bool = False) -> ModeDecision:
        """Decides for the blocks that start after engine step ``step``; once for all that are ``lossless``, or not.

        There are ``num_open`` requests.
        """
        choice = self._choices[lossless]
        if choice.decided_in == step:
            return choice.decision
        choice.decided_in, before = step, choice.decision.mode
        choice.since_change += 1
        self._note_load(_bucket(num_open))
        by_mode = self._measured((choice.other, "ar"))
        mode, reason = self._best(by_mode, before, choice.since_change)
        if mode != before:
            self._num_changes += 1
            choice.since_change = 0
            logger.info("diffusion_mode auto: %s; %d open requests", reason, num_open)
        tokens = num_open * self._canvas_length
        choice.decision = ModeDecision(
            mode, reason, {mode: measured.seconds_per_token * tokens for mode, measured in by_mode.items()}
        )
        return choice.decision

    def _note_load(self, bucket: int) -> None:
        """Notes the load; one that is several times another may change the mode at once."""
        if bucket != self._load:
            if abs(bucket - self._load) > 1:
                for choice in self._choices.values():
                    choice.since_change = MIN_DWELL
            self._load, self._blocks_of_load = bucket, 0.0

    def _measured(self, modes: tuple[BlockMode, ...]) -> dict[BlockMode, _Measured]:
        """What is known of modes: without prompts if there were enough such steps, else with them."""
        known = [
            {mode: of_steps[self._load, mode] for mode in modes}
            for of_steps in (self._without_prompts, self._of_all_steps)
        ]
        return next((by_mode for by_mode in known if all(one.blocks_left <= 0 for one in by_mode.values())), known[-1])

    def _best(self, by_mode: dict[BlockMode, _Measured], now: BlockMode, since_change: int) -> tuple[BlockMode, str]:
        """The mode, and why."""
        for mode, measured in by_mode.items():
            if measured.blocks_left > 0 and self._blocks_of_load < BLOCKS_TO_SETTLE:
                return now, "the load has just changed"
            if measured.blocks_left > 0:
                return mode, f"{mode} is tried"
        faster, slower = sorted(by_mode, key=lambda mode: by_mode[mode].seconds_per_token)
        gain = by_mode[slower].seconds_per_token / by_mode[faster].seconds_per_token - 1
        if gain < HOPELESS - 1 and by_mode[slower].blocks > BLOCKS_BETWEEN_TRIES:
            by_mode[slower].try_again()
            return slower, f"{slower} is tried again"
        if faster != now and (gain <= MARGIN or since_change < MIN_DWELL):
            return now, f"{faster} is {gain:.1%} faster, not enough or not for long enough"
        return faster, f"{faster} is {gain:.1%} faster"

    def take_changes(self) -> int:
        """How often the mode changed since the last call."""
        changes, self._num_changes = self._num_changes, 0
        return changes


def _bucket(rows: int) -> int:
    """The same for 1, 2, 3 to 4, 5 to 8, ... rows."""
    return (rows - 1).bit_length()
