"""The strategy that docs/requests.md adds as an example, installed as a package with an entry point."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_twotower.sampling.strategies import strategies

DOCUMENT = Path(__file__).parents[1] / "docs" / "requests.md"
ENTRY_POINT = "left_to_right = left_to_right_strategy:left_to_right"


def install_left_to_right(folder: Path, monkeypatch: pytest.MonkeyPatch, entry_point: str = ENTRY_POINT) -> None:
    """Puts the package where Python finds it until the test ends, after which ``strategies`` must be cleared."""
    example = DOCUMENT.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    (folder / "left_to_right_strategy.py").write_text(example)
    info = folder / "left_to_right_strategy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: left-to-right-strategy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[vllm_twotower.strategies]\n{entry_point}\n")
    monkeypatch.syspath_prepend(folder)
    strategies.cache_clear()
