"""Runs of an experiment: one way of generating on all tasks, answered by an engine, kept as the answers come."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_twotower.architecture import DEFAULT_CANVAS_LENGTH
from vllm_twotower.offline import small_engine
from vllm_twotower.options import ADDITIONAL_CONFIG_KEY, EngineOptions, RequestOptions
from vllm_twotower.progress import progress_bar

from .measures import Result, measure
from .store import Answer, Store, key_of
from .tasks import Task

if TYPE_CHECKING:
    from tqdm import tqdm
    from vllm import LLM

TRACED = {"diffusion_trace": "tokens"}
REQUEST_AXES = tuple(one.name for one in fields(RequestOptions) if one.name != "trace")
AXES = (*REQUEST_AXES, "temperature", "seed", "ablation")
"""What a run can choose: options of requests, without their prefix, and the engine's ``ablation``."""
_WORDS = {
    "confidence_threshold": "threshold {}",
    "max_steps": "at most {} pass(es)",
    "canvas_length": "width {}",
    "draft_steps": "drafts of {} pass(es)",
    "temperature": "temperature {}",
    "seed": "seed {}",
}


@dataclass(frozen=True)
class Workload:
    """What all runs have in common: the model, the tasks, and where answers end."""

    model: str
    tasks: Sequence[Task]
    max_tokens: int = 128
    stop: tuple[str, ...] = ()

    @cached_property
    def key(self) -> str:
        """Changes with the checkpoint's files, too."""
        files = sorted(Path(self.model).glob("*")) if Path(self.model).is_dir() else []
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        tasks = [asdict(task) for task in self.tasks]
        return key_of([str(self.model), stats, tasks, self.max_tokens, self.stop])


@dataclass(frozen=True)
class Run:
    """What is ``chosen`` of the axes, beside the ``engine``'s own options; a member of a sweep, and its name there."""

    workload: Workload
    sweep: str
    label: str
    chosen: Mapping[str, Any]
    engine: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises RequestError for an option that no engine would take."""
        self._options  # noqa: B018  # checks them

    @cached_property
    def _options(self) -> RequestOptions:
        diffusion = self.engine.get("diffusion_config", {})
        width = diffusion.get("canvas_length", DEFAULT_CANVAS_LENGTH)
        steps = diffusion.get("max_denoising_steps")
        engine = EngineOptions.resolve(self.engine.get("additional_config"), width, steps, vocab_size=1 << 31)
        return RequestOptions.parse(self.extra_args, engine)

    @cached_property
    def engine_options(self) -> dict[str, Any]:
        """Arguments of vLLM's ``LLM``."""
        options = dict(self.engine)
        if ablation := self.chosen.get("ablation"):
            additional = dict(options.get("additional_config", {}))
            additional[ADDITIONAL_CONFIG_KEY] = {**additional.get(ADDITIONAL_CONFIG_KEY, {}), "ablation": ablation}
            options["additional_config"] = additional
        return options

    @property
    def extra_args(self) -> dict[str, Any]:
        """The options of requests; a block may take as many passes as it is wide, unless that is chosen too."""
        given = {name: value for name, value in self.chosen.items() if name in REQUEST_AXES}
        if "canvas_length" in given and given.get("mode", "mask_diffusion") == "mask_diffusion":
            given.setdefault("max_steps", given["canvas_length"])
        return {f"diffusion_{name}": value for name, value in given.items()}

    @property
    def temperature(self) -> float:
        return self.chosen.get("temperature", 0.0)

    @property
    def seed(self) -> int | None:
        """None where nothing is drawn."""
        return self.chosen.get("seed", 0) if self.temperature else None

    @cached_property
    def key(self) -> str:
        """The same for runs that give the same answers, however their defaults are written."""
        return key_of([self.workload.key, self.engine_options, asdict(self._options), self.temperature, self.seed])


def label(chosen: Mapping[str, Any]) -> str:
    """A run's name by what is chosen."""
    words = []
    for name, value in chosen.items():
        if name == "ablation":
            words.append(ablation_label(value))
        elif isinstance(value, bool):
            words.append(name.replace("_", " ") if value else f"not {name.replace('_', ' ')}")
        else:
            text = f"{value:g}" if isinstance(value, float) else str(value).replace("_", " ")
            words.append(_WORDS.get(name, "{}").format(text).replace("(es)", "" if value == 1 else "es"))
    return ", ".join(words)


def ablation_label(ablation: Mapping[str, Any] | None) -> str:
    """An ablation in words."""
    given = ablation or {}
    words = []
    if not given.get("mamba_seed", True):
        words.append("no Mamba seed")
    if not given.get("context_kv", True):
        words.append("no context KV")
    if given.get("time") is not None:
        words.append(f"t always {given['time']:g}")
    if given.get("experts_per_token") is not None:
        words.append(f"experts a token: {given['experts_per_token']}")
    if layers := given.get("skip_denoiser_layers"):
        words.append(f"without layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}")
    return ", ".join(words) or "as trained"


class Engines:
    """One engine at a time, made when it is needed and kept until another one is."""

    def __init__(self, model: str):
        self._model, self._stack = model, ExitStack()
        self._options: Mapping[str, Any] | None = None
        self._llm: LLM | None = None

    def get(self, options: Mapping[str, Any]) -> LLM:
        """The engine with these options."""
        if self._llm is None or options != self._options:
            self.close()
            self._llm = self._stack.enter_context(small_engine(Path(self._model), **options))
            self._options = options
        return self._llm

    def close(self) -> None:
        """Ends the engine, if there is one."""
        self._llm = None
        self._stack.close()


def run_all(runs: Sequence[Run], store: Store, engines: Engines) -> dict[str, Result]:
    """The results of all runs by key; those that the store has are not made again."""
    distinct: dict[str, Run] = {}
    for run in runs:
        distinct.setdefault(run.key, run)
    results = {key: Result.from_json(found["result"]) for key in distinct if (found := store.get(key))}
    open_runs = [run for key, run in distinct.items() if key not in results]
    open_runs.sort(key=_place_of_engine(open_runs))
    kept = {run.key: store.answers(run.key) for run in open_runs}
    total = sum(len(run.workload.tasks) for run in open_runs)
    if not total:
        return results
    with progress_bar("starting an engine", total, "answers", sum(map(len, kept.values()))) as bar:
        for number, run in enumerate(open_runs, 1):
            what = f"{run.sweep}: {run.label} ({number} of {len(open_runs)})"
            bar.set_description_str(what, refresh=sys.stderr.isatty())
            tasks = run.workload.tasks
            missing = sorted(set(range(len(tasks))) - {answer.problem for answer in kept[run.key]})
            if missing:
                _answer(run, missing, store, engines, bar)
            result = results[run.key] = measure(tasks, store.answers(run.key))
            names = {"sweep": run.sweep, "label": run.label, "chosen": run.chosen, "engine": run.engine}
            store.put(run.key, {**names, "result": asdict(result)})
    return results


def _place_of_engine(runs: Sequence[Run]) -> Any:
    """The order of runs in which each engine is made once."""
    places: list[Mapping[str, Any]] = []
    for run in runs:
        if run.engine_options not in places:
            places.append(run.engine_options)
    return lambda run: places.index(run.engine_options)


def _answer(run: Run, problems: Sequence[int], store: Store, engines: Engines, bar: tqdm) -> None:
    llm = engines.get(run.engine_options)
    from vllm import SamplingParams

    workload = run.workload
    params = [
        SamplingParams(
            temperature=run.temperature,
            seed=None if run.seed is None else random.Random(f"{run.seed}/{problem}").getrandbits(31),
            max_tokens=workload.max_tokens,
            stop=list(workload.stop) or None,
            extra_args=run.extra_args | TRACED,
        )
        for problem in problems
    ]
    requests = llm.enqueue([workload.tasks[problem].prompt for problem in problems], params, use_tqdm=False)
    # Inside the engine an id has more behind it than in the outputs.
    problem_of = {request.partition("-")[0]: problem for request, problem in zip(requests, problems, strict=True)}
    with store.appending(run.key) as answers:
        while llm.llm_engine.has_unfinished_requests():
            for output in llm.llm_engine.step():
                [completion] = output.outputs
                if not output.finished or completion.finish_reason == "abort":
                    continue
                problem, trace = problem_of.pop(output.request_id), completion.diffusion_trace
                is_right = workload.tasks[problem].is_right(completion.text)
                blocks = [block.to_json() for block in trace.blocks]
                answers.add(Answer(problem, completion.text, is_right, trace.decided_in, blocks))
                bar.update()
    if problem_of:
        raise RuntimeError(f"the engine ended with {len(problem_of)} answers of {run.label!r} missing")
