"""What was decided of a request's tokens, when, and how surely: what the option ``diffusion_trace`` asks for.

``docs/traces.md`` lists the fields as users see them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TRACE = "diffusion_trace"
"""The option, the field of a response, and the attribute of vLLM's ``CompletionOutput``."""
LEVELS = ("none", "tokens", "passes")
"""The values of ``diffusion_trace``; each has what those before it have."""
MAX_CANVAS_POSITIONS = 16_384
"""The most positions that the canvases of a block may have together, where all of them are asked for."""


@dataclass
class BlockTrace:
    """One block that the denoiser filled or drafted, in ``passes`` passes.

    Its first returned token is number ``start`` of the completion's; ``tokens`` were returned of it. Of a draft that
    was verified ``drafted`` tokens came from the denoiser, and ``accepted`` of them stayed; otherwise both are None.
    With level ``passes``, ``t`` has the time that the denoiser was told in each pass, and ``canvases`` the tokens that
    stood in the canvas after it, the mask token where nothing was decided. A draft's canvas begins with the token
    before the block, which is known.
    """

    start: int
    tokens: int
    passes: int
    drafted: int | None = None
    accepted: int | None = None
    t: list[float] | None = None
    canvases: list[list[int]] | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields that the block has; times are rounded to six decimals."""
        found = {name: value for name, value in vars(self).items() if value is not None}
        if self.t is not None:
            found["t"] = _rounded(self.t)
        return found


@dataclass
class DiffusionTrace:
    """Lists with an entry for every token of a completion, or of a part of it in a stream; and its blocks.

    ``block`` is the number of the token's block in the request, ``decided_in`` the pass over that block, counted from
    1, in which the denoiser decided the token. Both are None where the context tower alone gave the token; of a draft
    the token behind the accepted ones has a block, but no pass. ``confidence`` is the token's probability when it was
    decided, before temperature and filters, and ``runner_up`` the largest probability of another token; in a verified
    block they are those of the context tower.
    """

    block: list[int | None] = field(default_factory=list)
    decided_in: list[int | None] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    runner_up: list[float] = field(default_factory=list)
    blocks: list[BlockTrace] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.block)

    def part(self, start: int, stop: int) -> DiffusionTrace:
        """The trace of the tokens from ``start`` up to ``stop``, with the blocks that some of them belong to."""
        blocks = [
            BlockTrace(**{**vars(block), "tokens": min(block.tokens, stop - block.start)})
            for block in self.blocks
            if start < block.start + block.tokens and block.start < stop
        ]
        here = slice(start, stop)
        of_tokens = self.block[here], self.decided_in[here], self.confidence[here], self.runner_up[here]
        return DiffusionTrace(*of_tokens, blocks)

    def extend(self, other: DiffusionTrace) -> None:
        """Adds the trace of the tokens that follow."""
        for name, values in vars(other).items():
            getattr(self, name).extend(values)

    def to_json(self) -> dict[str, Any]:
        """The form of HTTP responses; probabilities are rounded to six decimals."""
        return {
            "block": self.block,
            "decided_in": self.decided_in,
            "confidence": _rounded(self.confidence),
            "runner_up": _rounded(self.runner_up),
            "blocks": [block.to_json() for block in self.blocks],
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> DiffusionTrace:
        """The reverse of :meth:`to_json`."""
        return cls(**{**found, "blocks": [BlockTrace(**block) for block in found["blocks"]]})


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 6) for value in values]
