"""The file of an experiment: what is asked, and the sweeps that ask it; every key checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from vllm_twotower.architecture import DEFAULT_CANVAS_LENGTH
from vllm_twotower.models import embedded_model
from vllm_twotower.options import RequestError
from vllm_twotower.training.config import TrainConfigError as ConfigError
from vllm_twotower.training.config import parse_section
from vllm_twotower.training.problems import FAMILIES

from .runs import AXES, Run, Workload, label
from .tasks import Task, held_out_tasks, read_tasks


@dataclass(frozen=True)
class ProblemsConfig:
    """``count`` held-out problems drawn with ``seed``, of some ``families``; or the first ``count`` of a ``file``."""

    count: int = 200
    seed: int = 0
    families: list[str] = field(default_factory=list)
    file: str = ""

    def tasks(self) -> list[Task]:
        """The tasks; raises ConfigError where there are none."""
        if unknown := sorted(set(self.families) - set(FAMILIES)):
            raise ConfigError(f"problems.families has {unknown}: known are {', '.join(FAMILIES)}")
        if self.count < 1:
            raise ConfigError(f"problems.count is {self.count}: it must be at least 1")
        if not self.file:
            return held_out_tasks(self.count, self.seed, self.families)
        if not Path(self.file).is_file():
            raise ConfigError(f"problems.file is {self.file}, which does not exist")
        if not (tasks := read_tasks(Path(self.file))[: self.count]):
            raise ConfigError(f"problems.file is {self.file}, which is empty")
        return tasks


@dataclass(frozen=True)
class ExperimentConfig:
    """The file's keys."""

    output: str
    sweeps: list[dict]
    model: str = ""
    problems: ProblemsConfig = field(default_factory=ProblemsConfig)
    max_tokens: int = 128
    stop: list[str] = field(default_factory=list)
    engine: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """What is to be run, and the folder for what comes out."""

    output: Path
    workload: Workload
    runs: list[Run]


def load_experiment(path: Path) -> Experiment:
    """Reads a file; raises ConfigError for what is wrong in it, naming it and what is allowed."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"is no YAML: {error}") from None
    config: ExperimentConfig = parse_section(ExperimentConfig, content, where="")
    if config.max_tokens < 1:
        raise ConfigError(f"max_tokens is {config.max_tokens}: it must be at least 1")
    workload = Workload(
        config.model or str(embedded_model()), config.problems.tasks(), config.max_tokens, tuple(config.stop)
    )
    runs: list[Run] = []
    for number, sweep in enumerate(config.sweeps):
        name = sweep.get("name")
        if not isinstance(name, str) or not name or name in [run.sweep for run in runs]:
            raise ConfigError(f"sweeps[{number}].name is {name!r}: every sweep needs a name of its own")
        runs += _runs(workload, config.engine, sweep, f"sweeps[{number}]")
    if not runs:
        raise ConfigError("sweeps is empty")
    return Experiment(Path(config.output), workload, runs)


def _runs(workload: Workload, engine: dict[str, Any], sweep: dict[str, Any], where: str) -> list[Run]:
    """All combinations of what a sweep lists."""
    for key in sweep:
        if key not in ("name", "engine", *AXES):
            raise ConfigError(f"unknown key {where}.{key}; known keys are name, engine, {', '.join(AXES)}")
    of_sweep = sweep.get("engine", {})
    if not isinstance(of_sweep, dict):
        raise ConfigError(f"{where}.engine is {of_sweep!r}: expected options of vLLM's LLM")
    axes = {key: value if isinstance(value, list) else [value] for key, value in sweep.items() if key in AXES}
    if empty := [name for name, values in axes.items() if not values]:
        raise ConfigError(f"{where}.{empty[0]} has no value")
    engine = _wide_enough({**engine, **of_sweep}, axes.get("canvas_length", []))
    varied = [name for name, values in axes.items() if len(values) > 1]
    runs = []
    for values in product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        _check_sampling(chosen, where)
        try:
            name = label({axis: chosen[axis] for axis in varied}) or sweep["name"]
            run = Run(workload, sweep["name"], name, chosen, engine)
        except (RequestError, ValueError) as error:
            raise ConfigError(f"{where}: {error}") from None
        runs.append(run)
    return runs


def _wide_enough(engine: dict[str, Any], widths: list[Any]) -> dict[str, Any]:
    """The engine's options, with a canvas for the widest run unless they say how wide it is."""
    widest = max((width for width in widths if isinstance(width, int)), default=0)
    if widest <= DEFAULT_CANVAS_LENGTH or "diffusion_config" in engine:
        return engine
    return {**engine, "diffusion_config": {"canvas_length": widest}}


def _check_sampling(chosen: dict[str, Any], where: str) -> None:
    temperature, seed, ablation = (chosen.get(name) for name in ("temperature", "seed", "ablation"))
    if temperature is not None and (not isinstance(temperature, int | float) or temperature < 0):
        raise ConfigError(f"{where}.temperature is {temperature!r}: expected a number of at least 0")
    if seed is not None and (not isinstance(seed, int) or not temperature):
        raise ConfigError(f"{where}.seed is {seed!r}: expected an integer, beside a temperature greater than 0")
    if ablation is not None and not isinstance(ablation, dict):
        raise ConfigError(f"{where}.ablation is {ablation!r}: expected a mapping")
