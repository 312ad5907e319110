"""The golden records as Python objects, shared by the tests that compare with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from vllm import SamplingParams

GOLDEN = Path(__file__).parent / "golden"
CHECKPOINTS = ("A", "B", "C")


@dataclass(frozen=True)
class DiffusionRun:
    """One mask-diffusion generation: its prompt, its settings, and what must come out."""

    prompt: tuple[int, ...]
    block_size: int
    steps: int
    gamma: float
    mask_token_id: int
    max_new_tokens: int
    eos_token_id: int | None
    tokens: tuple[int, ...]
    nfe: int
    blocks: tuple[tuple[tuple[float, tuple[int, ...], tuple[int, ...]], ...], ...]
    """For every block every denoiser pass: t, canvas before, canvas after; empty where the record has no steps."""

    def params(self, **overrides: Any) -> SamplingParams:
        """The sampling parameters that ask for it."""
        options = {
            "temperature": 0,
            "max_tokens": self.max_new_tokens,
            "ignore_eos": True,
            "stop_token_ids": None if self.eos_token_id is None else [self.eos_token_id],
            "extra_args": {
                "diffusion_confidence_threshold": self.gamma,
                "diffusion_max_steps": self.steps,
                "diffusion_canvas_length": self.block_size,
            },
        }
        return SamplingParams(**{**options, **overrides})


def checkpoint(name: str) -> Path:
    return GOLDEN / f"ckpt_{name}"


def changed_checkpoint(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of checkpoint A at ``folder`` whose tensors ``change`` has changed in place."""
    shutil.copytree(checkpoint("A"), folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@cache
def record(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"golden_{name}.json").read_text())


def prompts(name: str) -> list[dict[str, Any]]:
    return record(name)["prompts"]


def until_eos(tokens: list[int], eos_token_id: int | None) -> tuple[int, ...]:
    """The tokens up to and with the first EOS: what a served request returns."""
    end = tokens.index(eos_token_id) + 1 if eos_token_id in tokens else len(tokens)
    return tuple(tokens[:end])


def _run(prompt: dict[str, Any], run: dict[str, Any], default_mask: int) -> DiffusionRun:
    blocks = tuple(
        tuple((step["t"], tuple(step["canvas_in"]), tuple(step["canvas_out"])) for step in block["steps"])
        for block in run.get("blocks", ())
    )
    eos = run.get("eos_token_id")
    return DiffusionRun(
        prompt=tuple(prompt["ids"]),
        block_size=run["block_size"],
        steps=run["steps_per_block"],
        gamma=run["gamma"],
        mask_token_id=blocks[0][0][1][0] if blocks else default_mask,
        max_new_tokens=run["max_new_tokens"],
        eos_token_id=eos,
        tokens=until_eos(run["new_ids"], eos),
        nfe=run["nfe"],
        blocks=blocks,
    )


def diffusion_runs(name: str, kind: str = "diffusion") -> list[DiffusionRun]:
    """All mask-diffusion records of a kind: ``diffusion``, ``alt_mask_runs`` or ``eos_runs``."""
    default_mask = record(name)["mask_token_id"]
    return [
        _run(prompt, run, default_mask)
        for prompt in prompts(name)
        for run in prompt.get(kind, ())
        if "block_size" in run
    ]


def recorded_logits(name: str, run: DiffusionRun) -> dict[tuple[int, int], np.ndarray]:
    """Full-vocabulary logits (S, V) of the passes (block, step) of a run that were recorded."""
    with np.load(GOLDEN / f"logits_{name}.npz") as arrays:
        key = f"len{len(run.prompt)}/B{run.block_size}S{run.steps}G{run.gamma}"
        names = {(b, s): f"{key}/b{b}s{s}" for b, block in enumerate(run.blocks) for s in range(len(block))}
        return {index: arrays[array] for index, array in names.items() if array in arrays}
