"""Training on two processes: FSDP2 under torchrun and Ray Train give the losses of a single process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).parents[2]
STEPS = 30
TORCHRUN = [
    "-m",
    "torch.distributed.run",
    "--nproc-per-node",
    "2",
    "--standalone",
    "-m",
    "vllm_twotower.training",
]
COMMANDS = {
    "one": ["-m", "vllm_twotower.training"],
    "torchrun": TORCHRUN,
    "ray": ["-m", "vllm_twotower.training", "--ray", "2"],
}


def configuration(run_dir: Path) -> dict:
    """The shipped configuration, small enough for seconds, and so that a run of fewer steps is the start of another."""
    content = yaml.safe_load((REPOSITORY / "configs" / "train-tiny.yaml").read_text())
    content |= {"run_dir": str(run_dir), "compile": False, "bf16_autocast": False, "threads": 1, "log_every": 1}
    content["data_workers"] = 0
    content["model"] |= {"hybrid_override_pattern": "M*-", "num_hidden_layers": 3, "hidden_size": 64, "vocab_size": 400}
    content["tokenizer"] = {"vocab_size": 400, "documents": 300}
    content["data"]["sequence_length"] = 128
    for source in content["data"]["sources"]:
        source["documents"] //= 400
    for stage in ("ar", "denoiser"):
        content[stage] |= {
            "steps": STEPS,
            "batch_size": 4,
            "warmup_steps": 5,
            "decay_fraction": 0.0,
            "learning_rate": 5e-3,
        }
    content["denoiser"] |= {"accumulate": 2, "blocks_per_sequence": 8}
    return content


def train(how: str, folder: Path, content: dict) -> dict[str, list[float]]:
    """Trains in processes of their own; the losses of both stages by step."""
    path = folder / f"{how}.yaml"
    path.write_text(yaml.safe_dump(content))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    done = subprocess.run(
        [sys.executable, *COMMANDS[how], str(path), "--only", "train"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (Path(content["run_dir"]) / "log.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    return {stage: [entry["loss"] for entry in entries if entry["stage"] == stage] for stage in ("ar", "denoiser")}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    folder = tmp_path_factory.mktemp("one")
    return train("one", folder, configuration(folder / "run"))


@pytest.mark.ray
def test_two_ranks_give_the_losses_of_one(tmp_path: Path, alone: dict[str, list[float]]):
    losses = train("ray", tmp_path, configuration(tmp_path / "run"))
    for stage, expected in alone.items():
        assert len(expected) == STEPS
        assert losses[stage] == pytest.approx(expected, abs=1e-3)
    # Both stages learn: the first from nothing, the second from a copy of the context tower.
    assert losses["ar"][-1] < losses["ar"][0] - 1
    assert sum(losses["denoiser"][-5:]) < sum(losses["denoiser"][:5]) - 0.5


def test_a_run_goes_on_with_other_ranks(tmp_path: Path, alone: dict[str, list[float]]):
    """All of the first stage and 12 steps of the second on two ranks, the rest on one: the losses of one throughout."""
    content = configuration(tmp_path / "run")
    content["denoiser"]["steps"] = 12
    first = train("torchrun", tmp_path, content)
    assert [len(losses) for losses in first.values()] == [STEPS, 12]
    content["denoiser"]["steps"] = STEPS
    resumed = train("one", tmp_path, content)
    for stage, expected in alone.items():
        assert resumed[stage] == pytest.approx(expected, abs=1e-3)
