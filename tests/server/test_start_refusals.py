"""`vllm serve` exits and says why, in its last lines; tests/engine/test_refusals.py has every reason."""

from __future__ import annotations

import json
from pathlib import Path

import golden_data
from serving import refused_start


def test_bad_option_of_the_engine(tmp_path: Path) -> None:
    options = json.dumps({"twotower": {"mode": "x"}})
    status, output = refused_start(golden_data.checkpoint("A"), tmp_path / "log", "--additional-config", options)
    assert status != 0
    last_lines = "".join(output.splitlines()[-3:])
    assert (
        "additional_config['twotower'].mode='x': must be one of 'mask_diffusion', 'verified', 'ar', 'auto'"
        in last_lines
    )


def test_missing_tensor(tmp_path: Path) -> None:
    name = "denoiser_tower.layers.2.mixer.D"
    folder = golden_data.changed_checkpoint(tmp_path / "changed", lambda tensors: tensors.pop(name))
    status, output = refused_start(folder, tmp_path / "log", "--kv-cache-memory-bytes", "64M")
    assert status != 0
    assert f"missing in the TwoTower checkpoint: {name} [4]" in output


def test_embeddings(tmp_path: Path) -> None:
    status, output = refused_start(golden_data.checkpoint("A"), tmp_path / "log", "--runner", "pooling")
    assert status != 0
    assert "runner='pooling' is not supported for TwoTower models" in "".join(output.splitlines()[-3:])
