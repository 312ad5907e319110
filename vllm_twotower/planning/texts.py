"""How many denoiser passes the released model takes for a block of 16 tokens, by the kind of text and the threshold.

Measured by others on the released checkpoint, with blocks of 16 tokens, at most 16 passes, greedy
(github.com/junze-eng/twotower-repro, analysis_data).
"""

from __future__ import annotations

import numpy as np

from .steps_per_block import StepsPerBlock

ARITHMETIC_BLOCKS = (43, 17, 13, 19, 7, 8, 10, 11, 6, 2, 4, 3, 4, 4, 5, 4)
"""Blocks that took 1, 2, ... 16 passes at threshold 0.8: all 160 of arithmetic problems."""

MEAN_PASSES = {"arithmetic": 5.2, "answers": 6.75, "humaneval": 6.6, "open": 10.5}
"""Passes a block at threshold 0.8: arithmetic problems, those of their blocks that lie in the answer, HumanEval's code,
and open prompts."""

OPEN_PASSES = {0.5: 7.9, 0.7: 9.5, 0.8: 10.5, 0.9: 11.9, 0.95: 12.8}
"""Passes a block of open prompts, by threshold."""

OPEN_TOKENS_PER_PASS = {0.5: 2.52, 0.7: 2.01, 0.8: 1.78, 0.9: 1.52, 0.95: 1.35}
"""Tokens that a pass commits for open prompts, by threshold, as published: a mean of ratios, so a little more than
16 / :data:`OPEN_PASSES`."""

FORCED_TOKENS_PER_PASS = {4: 5.79, 8: 2.61}
"""Tokens a pass at threshold 0.8 where a block may take so many passes; how good such texts are was not published."""


def steps_of_text(text: str, threshold: float = 0.8) -> StepsPerBlock:
    """Passes a block of this kind of text: measured for arithmetic at 0.8, else the narrowest distribution of the mean.

    Other thresholds were measured for open prompts alone, and lie on straight lines between these; other texts are
    taken to gain the same share of their passes after the first. Raises ValueError outside of what was measured.
    """
    thresholds = sorted(OPEN_PASSES)
    if not thresholds[0] <= threshold <= thresholds[-1]:
        raise ValueError(f"threshold is {threshold:g}: measured are {thresholds[0]:g} to {thresholds[-1]:g}")
    if text == "arithmetic" and threshold == 0.8:
        blocks = sum(ARITHMETIC_BLOCKS)
        return StepsPerBlock(
            tuple(range(1, len(ARITHMETIC_BLOCKS) + 1)), tuple(count / blocks for count in ARITHMETIC_BLOCKS)
        )
    of_open = float(np.interp(threshold, thresholds, [OPEN_PASSES[value] for value in thresholds]))
    share = (of_open - 1) / (OPEN_PASSES[0.8] - 1)
    return StepsPerBlock.of_mean(1 + share * (MEAN_PASSES[text] - 1))
