"""The training loop of one stage: batches by step number, AdamW, a log in JSON lines, checkpoints to resume from."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vllm_twotower.reference import TwoTowerModel
from vllm_twotower.training.config import StageConfig, TrainConfig, TrainConfigError
from vllm_twotower.training.data import Batch, part_of
from vllm_twotower.training.distributed import device, full, mean_over_ranks, rank, world_size

ADAM_BETAS = (0.9, 0.95)
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass(frozen=True)
class Stage:
    """What distinguishes one stage: its name, its settings, the modules it trains, its batches and its loss."""

    name: str
    config: StageConfig
    trained: list[nn.Module | nn.ParameterList]
    make_batch: Callable[[int], Batch]  # step -> batch
    loss: Callable[[TwoTowerModel, Any], Tensor]  # of a batch of its own kind
    tokens_per_step: int  # positions that the trained tower predicts


class _Batches(Dataset[Batch]):
    """A stage's batches by step number."""

    def __init__(self, stage: Stage):
        self._stage = stage

    def __len__(self) -> int:
        return self._stage.config.steps

    def __getitem__(self, step: int) -> Batch:
        return self._stage.make_batch(step)


@dataclass
class Progress:
    """Where a stage stands."""

    step: int = 0
    seconds: float = 0.0  # of training, over all sessions


def learning_rate(config: StageConfig, step: int) -> float:
    """Linear warm-up, constant, linear decay to zero over the last decay_fraction of the steps."""
    decay_steps = config.steps * config.decay_fraction
    warmup = (step + 1) / max(1, config.warmup_steps)
    decay = (config.steps - step) / max(1.0, decay_steps)
    return config.learning_rate * min(1.0, warmup, decay)


def run_stage(model: TwoTowerModel, stage: Stage, config: TrainConfig, run_dir: Path) -> Progress:
    """Trains until the stage's last step, going on from its checkpoint in `run_dir` if there is one."""
    if stage.config.batch_size % (world_size() * stage.config.accumulate):
        raise TrainConfigError(
            f"{stage.name}.batch_size is {stage.config.batch_size}: it must be a multiple of accumulate "
            f"({stage.config.accumulate}) times the number of processes ({world_size()})"
        )
    optimizer = _make_optimizer(model, stage)
    checkpoint = run_dir / f"{stage.name}.pt"
    progress = load_checkpoint(checkpoint, model, optimizer) if checkpoint.exists() else Progress()
    loss_function = torch.compile(stage.loss) if config.compile and world_size() == 1 else stage.loss
    model.train()
    started, saved = time.monotonic() - progress.seconds, time.monotonic()
    recent: list[tuple[Tensor, Tensor]] = []
    steps = range(progress.step, stage.config.steps)
    workers = min(config.data_workers, (os.cpu_count() or 1) - 1)
    batches = DataLoader(_Batches(stage), batch_size=None, sampler=steps, num_workers=workers)
    with _progress_bar(stage, progress) as bar:
        if loss_function is not stage.loss and rank() == 0:
            bar.write(f"{stage.name}: the first step compiles the loss, which takes minutes", file=sys.stderr)
        for step, batch in zip(steps, batches, strict=True):
            recent.append(_train_step(model, stage, loss_function, optimizer, batch, step, config.bf16_autocast))
            progress.step = step + 1
            progress.seconds = time.monotonic() - started
            bar.update(stage.tokens_per_step)
            is_last = progress.step == stage.config.steps
            if progress.step % config.log_every == 0 or is_last:
                loss = _log(run_dir, stage, progress, recent)
                recent = []
                bar.set_postfix(step=f"{progress.step}/{stage.config.steps}", loss=f"{loss:.4f}", refresh=False)
            if mean_over_ranks(time.monotonic() - saved) > 60 * config.checkpoint_minutes or is_last:
                save_checkpoint(checkpoint, model, optimizer, progress)
                saved = time.monotonic()
    model.eval()
    return progress


def _progress_bar(stage: Stage, progress: Progress) -> tqdm:
    """Tokens done, time left and tokens/s, of the first rank."""
    return tqdm(
        desc=stage.name,
        total=stage.config.steps * stage.tokens_per_step,
        initial=progress.step * stage.tokens_per_step,
        unit="tokens",
        unit_scale=True,
        disable=rank() != 0,
        mininterval=1.0 if sys.stderr.isatty() else 60.0,
    )


def save_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """Writes weights, optimizer state and progress; a kill while writing leaves the old file intact.

    The file does not depend on the number of ranks.
    """
    content = {
        "model": get_model_state_dict(model, options=_WHOLE),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=_WHOLE),
        "progress": vars(progress),
    }
    if rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save(content, partial)
        os.replace(partial, path)


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Progress:
    """Restores what save_checkpoint wrote."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, content["model"], options=options)
    if optimizer is not None:
        set_optimizer_state_dict(model, optimizer, content["optimizer"], options=options)
    return Progress(**content["progress"])


def read_log(run_dir: Path, stage: str) -> list[dict[str, Any]]:
    """The log entries of a stage, each step once (a resumed run repeats steps after its checkpoint)."""
    path = run_dir / "log.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    entries = {entry["step"]: entry for entry in map(json.loads, lines) if entry["stage"] == stage}
    return [entries[step] for step in sorted(entries)]


def _make_optimizer(model: TwoTowerModel, stage: Stage) -> torch.optim.AdamW:
    """AdamW on the stage's parameters, all others frozen; no weight decay for vectors (norms, biases, A, D, dt)."""
    model.requires_grad_(False)
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in _parameters(stage):
        parameter.requires_grad_(True)
        (decayed if parameter.ndim > 1 else others).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": stage.config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=stage.config.learning_rate, betas=ADAM_BETAS)


def _parameters(stage: Stage) -> Iterator[nn.Parameter]:
    """Each once, also where towers share them."""
    yield from dict.fromkeys(parameter for module in stage.trained for parameter in module.parameters())


def _train_step(
    model: TwoTowerModel,
    stage: Stage,
    loss_function: Callable[[TwoTowerModel, Batch], Tensor],
    optimizer: torch.optim.AdamW,
    batch: Batch,
    step: int,
    bf16_autocast: bool,
) -> tuple[Tensor, Tensor]:
    """One update; returns the loss and the gradient's norm before clipping, on the device: reading them would wait.

    A part's loss is its share of the whole batch's weighted mean, times the number of ranks, over which FSDP averages.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(stage.config, step)
    parts, on = stage.config.accumulate, device()
    total = torch.zeros((), device=on)
    for i in range(parts):
        part = part_of(batch, rank() * parts + i, parts * world_size(), on)
        with torch.autocast(on.type, torch.bfloat16, enabled=bf16_autocast):
            loss = loss_function(model, part) * world_size()
        loss.backward()
        total += loss.detach()
    norm = full(nn.utils.clip_grad_norm_(list(_parameters(stage)), stage.config.clip_norm))
    optimizer.step()
    optimizer.zero_grad()
    return total, norm


def _log(run_dir: Path, stage: Stage, progress: Progress, recent: list[tuple[Tensor, Tensor]]) -> float:
    """Writes means since the last entry, returns the loss; raises FloatingPointError if a loss is not finite."""
    losses, norms = (torch.stack(values).mean() for values in zip(*recent, strict=True))
    loss = mean_over_ranks(losses.item())
    entry = {
        "stage": stage.name,
        "step": progress.step,
        "tokens": progress.step * stage.tokens_per_step,
        "loss": loss,
        "gradient_norm": norms.item(),
        "learning_rate": learning_rate(stage.config, progress.step - 1),
        "seconds": round(progress.seconds, 1),
    }
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss of stage {stage.name} is {loss} up to step {progress.step}")
    if rank() == 0:
        with (run_dir / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(entry) + "\n")
    return loss
