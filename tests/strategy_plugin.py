"""A strategy that a user might add, installed as a package with an entry point."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_twotower.engine.strategies import strategies

MODULE = '''
import torch
from vllm_twotower.engine.strategies import Commit, Strategy, most

def commit(denoised, options):
    """The first masked position, and in the last pass all."""
    order = -torch.arange(denoised.masked.shape[1]).expand(denoised.masked.shape).float()
    last = denoised.step >= options.max_steps - 1
    k = torch.where(last, denoised.masked.sum(1), torch.ones_like(denoised.step))
    return Commit(most(order, denoised.masked, k), denoised.step)

left_to_right = Strategy(commit)
'''
ENTRY_POINT = "left_to_right = left_to_right_strategy:left_to_right"


def install_left_to_right(folder: Path, monkeypatch: pytest.MonkeyPatch, entry_point: str = ENTRY_POINT) -> None:
    """Puts the package where Python finds it until the test ends, after which ``strategies`` must be cleared."""
    (folder / "left_to_right_strategy.py").write_text(MODULE)
    info = folder / "left_to_right_strategy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: left-to-right-strategy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[vllm_twotower.strategies]\n{entry_point}\n")
    monkeypatch.syspath_prepend(folder)
    strategies.cache_clear()
