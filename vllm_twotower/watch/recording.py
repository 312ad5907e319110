"""What a request did: its tokens, and every pass over every block, as frames that can be shown one after another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from vllm_twotower.trace import BlockTrace, DiffusionTrace

State = Literal["mask", "new", "kept", "accepted", "rejected", "context", "cut"]
"""Of a place in a canvas: undecided, decided in this pass, or before it. Of a draft that was verified: accepted,
rejected, or the context tower's own token behind the accepted ones. ``cut`` is what stands behind the text's end."""
LONGEST_CHARACTER = 6
"""Tokens that a character's bytes may be spread over; what is longer is no character."""


@dataclass(frozen=True)
class Chunk:
    """New tokens of a request, their trace, and the seconds since it was sent."""

    seconds: float
    token_ids: list[int]
    trace: DiffusionTrace


@dataclass(frozen=True)
class Cell:
    """A token at its place, or a mask, whose text is that of the token that will stand there.

    ``decided_in`` is the pass over the block, counted from 1. Probabilities are None where they are not known: of
    masks, of rejected tokens, and of those behind the text's end.
    """

    text: str
    state: State
    confidence: float | None = None
    runner_up: float | None = None
    decided_in: int | None = None
    block: int | None = None


@dataclass(frozen=True)
class Frame:
    """The first ``tokens`` tokens of the text, and the canvas behind them after pass ``number`` of ``of``.

    Pass 0 has masks alone. ``passes`` were made for the tokens before the canvas, those of verification included.
    """

    seconds: float
    tokens: int
    passes: int
    block: int | None = None
    number: int = 0
    of: int = 0
    verified: bool = False
    cells: tuple[Cell, ...] = ()
    last: bool = False


@dataclass
class Recording:
    """A request, growing with the chunks that are added to it.

    ``decode`` gives the text of token ids. A chunk comes when all of it is done: the passes and tokens in it are
    taken to have come at equal distances since the chunk before.
    """

    prompt: str
    model: str
    mode: str
    decode: Callable[[Sequence[int]], str]
    settings: dict[str, float] = field(default_factory=dict)
    text: list[Cell] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=list)
    seconds: float = 0.0
    passes: int = 0
    _blocks: int = 0
    _unfinished: list[int] = field(default_factory=list)
    _texts: dict[int, str] = field(default_factory=dict)

    @property
    def completion(self) -> str:
        """The text of all tokens."""
        return "".join(cell.text for cell in self.text)

    def rate(self, tokens: int | None = None) -> float | None:
        """Tokens/s from the request's start to the last token, or to number ``tokens``."""
        tokens = len(self.text) if tokens is None else tokens
        return tokens / self.times[tokens - 1] if tokens and self.times[tokens - 1] > 0 else None

    def add(self, chunk: Chunk) -> list[Frame]:
        """The frames that a chunk adds."""
        first, before = len(self.text), len(self.frames)
        blocks = {block.start: block for block in chunk.trace.blocks if block.start >= first}
        inside = sum(block.tokens for block in blocks.values())
        slots = sum(map(_slots, blocks.values())) + len(chunk.token_ids) - inside
        width = (chunk.seconds - self.seconds) / max(slots, 1)
        slot, place = 0, 0
        while place < len(chunk.token_ids):
            start = self.seconds + slot * width
            block = blocks.get(first + place)
            if block is None or not block.tokens:
                self._append(chunk, place, start + width)
                self.passes += not block and self.mode == "ar"
                self.frames.append(Frame(start + width, len(self.text), self.passes))
                slot, place = slot + 1, place + 1
                continue
            self._blocks += 1
            end = place + block.tokens
            self._add_passes(chunk, block, place, start, width)
            slot += _slots(block)
            for i in range(place, min(end, len(chunk.token_ids))):
                self._append(chunk, i, self.seconds + slot * width, block)
            self.passes += block.passes + (block.accepted is not None)
            place = end
        self.seconds = chunk.seconds
        return self.frames[before:]

    def finish(self) -> list[Frame]:
        """The last frame: all of the text."""
        self.frames.append(Frame(self.seconds, len(self.text), self.passes, last=True))
        return self.frames[-1:]

    def _append(self, chunk: Chunk, place: int, seconds: float, block: BlockTrace | None = None) -> None:
        self._unfinished.append(chunk.token_ids[place])
        text = self._single(*self._unfinished) if len(self._unfinished) == 1 else self.decode(self._unfinished)
        if text.endswith("\ufffd") and len(self._unfinished) < LONGEST_CHARACTER:
            text = ""  # the bytes of a character that later tokens complete
        else:
            self._unfinished.clear()
        decided_in = chunk.trace.decided_in[place]
        is_draft = block is not None and block.accepted is not None
        state: State = "context" if decided_in is None else "accepted" if is_draft else "kept"
        self.text.append(Cell(text, state, *_probabilities(chunk, place), decided_in, self._blocks if block else None))
        self.times.append(seconds)

    def _single(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self.decode([token])
        return self._texts[token]

    def _add_passes(self, chunk: Chunk, block: BlockTrace, place: int, start: float, width: float) -> None:
        is_draft = block.accepted is not None
        # A draft's canvas begins with a token of the text.
        canvases = [canvas[is_draft:] for canvas in block.canvases or []]
        if not canvases:
            return
        mask, final = _mask(canvases), canvases[-1]
        known = [
            Cell(
                self._single(token),
                "kept" if is_draft or i < block.tokens else "cut",
                decided_in=_decided_in(canvases, i),
                block=self._blocks,
            )
            for i, token in enumerate(final)
        ]
        # A draft has no probabilities before the context tower has read it.
        for i in range(0 if is_draft else min(block.tokens, len(known))):
            confidence, runner_up = _probabilities(chunk, place + i)
            known[i] = replace(known[i], confidence=confidence, runner_up=runner_up)
        masks = [Cell(cell.text, "mask", block=self._blocks) for cell in known]
        rows, before = [masks], [-1 if mask is None else mask] * len(final)
        for canvas in canvases:
            row = []
            for i, token in enumerate(canvas):
                # A strategy may take back what an earlier pass decided.
                cell = known[i] if token == final[i] else Cell(self._single(token), "kept", block=self._blocks)
                if token == mask:
                    cell = masks[i]
                elif token != before[i] and cell.state == "kept":
                    cell = replace(cell, state="new")
                row.append(cell)
            rows.append(row)
            before = canvas
        if is_draft:
            rows.append(self._verdict(chunk, block, place, known))
        for number, row in enumerate(rows):
            where = self._blocks, min(number, len(canvases)), len(canvases), number > len(canvases)
            self.frames.append(Frame(start + number * width, len(self.text), self.passes, *where, tuple(row)))

    def _verdict(self, chunk: Chunk, block: BlockTrace, place: int, draft: list[Cell]) -> list[Cell]:
        """A draft that the context tower has read: what it accepted, its own token, and what it rejected."""
        accepted = block.accepted or 0
        stay = min(block.tokens, accepted)
        row = []
        for i, cell in enumerate(draft[:stay]):
            confidence, runner_up = _probabilities(chunk, place + i)
            row.append(replace(cell, state="accepted", confidence=confidence, runner_up=runner_up))
        if block.tokens > stay:
            text = self._single(chunk.token_ids[place + stay])
            row.append(Cell(text, "context", *_probabilities(chunk, place + stay), None, self._blocks))
        row += [replace(cell, state="cut") for cell in draft[stay:accepted]]
        return row + [replace(cell, state="rejected") for cell in draft[accepted:]]


@dataclass(frozen=True)
class Moment:
    """What is seen at a time: a frame of the recording, and so many tokens of the one that it races."""

    seconds: float
    frame: Frame
    rival_tokens: int = 0


def timeline(recording: Recording, rival: Recording | None = None) -> list[Moment]:
    """The frames in order of time, with the rival's tokens where there is one; it may finish later."""
    moments = {frame.seconds: frame for frame in recording.frames} if rival else {}
    if rival is None:
        return [Moment(frame.seconds, frame) for frame in recording.frames]
    times = sorted({*moments, *rival.times})
    found, frame, tokens = [], recording.frames[0], 0
    for seconds in times:
        frame = moments.get(seconds, frame)
        while tokens < len(rival.times) and rival.times[tokens] <= seconds:
            tokens += 1
        found.append(Moment(seconds, frame, tokens))
    return found


def _probabilities(chunk: Chunk, place: int) -> tuple[float, float]:
    return chunk.trace.confidence[place], chunk.trace.runner_up[place]


def _decided_in(canvases: list[list[int]], place: int) -> int:
    """The pass since which the last canvas's token stands at a place."""
    last = canvases[-1][place]
    return max((n for n, canvas in enumerate(canvases, 1) if canvas[place] != last), default=0) + 1


def _slots(block: BlockTrace) -> int:
    return block.passes + 1 + (block.accepted is not None)


def _mask(canvases: list[list[int]]) -> int | None:
    """The mask token of some canvases, the last of which has none: what most often gives way to another token."""
    gave_way = Counter(
        token for canvas in canvases for token, final in zip(canvas, canvases[-1], strict=True) if token != final
    )
    return gave_way.most_common(1)[0][0] if gave_way else None
