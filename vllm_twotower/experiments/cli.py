"""Runs the sweeps of a YAML file through the engine: quality, passes, order of unmasking, agreement with AR.

Writes results.jsonl, report.md and plots into the file's output folder, answers as they come. Interrupted, it goes on
where it was when it is given again. docs/experiments.md has the file's keys.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vllm_twotower.offline import small_engine_options, use_one_thread

from .measures import Result
from .runs import Engines, Run, run_all
from .store import Store

DEV_MODE = "VLLM_SERVER_DEV_MODE"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("file", type=Path, help="YAML file, for example configs/experiments/tiny.yaml")


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    use_one_thread()
    from .figures import draw_all
    from .report import markdown
    from .schema import load_experiment

    try:
        experiment = load_experiment(args.file)
        runs, workload = experiment.runs, experiment.workload
        allow_ablations(runs)
        check_engines(runs)
    except (OSError, ValueError) as error:
        raise SystemExit(f"vllm-twotower experiment: {args.file}: {error}") from None
    store = Store(experiment.output)
    with goes_on(store.folder), closing(Engines(workload.model)) as engines:
        results = run_all(runs, store, engines)
    rows = rows_of(runs, results)
    plots = draw_all(rows, store.folder)
    introduction = [
        f"`vllm-twotower experiment {args.file}`: {Path(workload.model).name}, {len(workload.tasks)} problems, at most "
        f"{workload.max_tokens} tokens, greedy where no temperature is given. Passes are the denoiser's, for verified "
        "drafts those of both towers."
    ]
    text = markdown(args.file.stem, introduction, rows, identical_texts(runs, store), plots)
    (store.folder / "report.md").write_text(text, encoding="utf-8")
    print(f"{store.folder / 'report.md'}: {len(rows)} runs, {len(plots)} plots")


def allow_ablations(runs: Sequence[Run]) -> None:
    """Sets vLLM's switch for developers where a run needs it; an engine reads it when it is made."""
    if any(run.chosen.get("ablation") for run in runs):
        os.environ[DEV_MODE] = "1"


def check_engines(runs: Sequence[Run]) -> None:
    """Raises ValueError for the first engine that vLLM would not make, before any is made."""
    from vllm import EngineArgs

    checked: list[Mapping[str, Any]] = []
    for run in runs:
        if run.engine_options not in checked:
            checked.append(run.engine_options)
            try:
                EngineArgs(run.workload.model, **small_engine_options(**run.engine_options)).create_engine_config()
            except (TypeError, ValueError) as error:
                found = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
                raise ValueError(f"the engine of sweep {run.sweep!r}, {run.label}: {found}") from None


@contextmanager
def goes_on(folder: Path) -> Iterator[None]:
    """Ends an interrupted command with one line and code 130."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\nInterrupted: {folder} keeps what is answered; the same command goes on.", file=sys.stderr)
        raise SystemExit(130) from None


def rows_of(runs: Sequence[Run], results: Mapping[str, Result]) -> list:
    """The runs as tables and plots show them."""
    from .figures import Row

    return [
        Row(
            run.key,
            run.sweep,
            run.label,
            results[run.key],
            is_ar=run.chosen.get("mode") == "ar" and not run.temperature,
            is_ablated=bool(run.chosen.get("ablation")),
        )
        for run in runs
    ]


def identical_texts(runs: Sequence[Run], store: Store) -> dict[str, int]:
    """By key of the greedy runs, how many of their texts are those of autoregression; nothing without that."""
    ar = next((run for run in runs if run.chosen.get("mode") == "ar" and not run.temperature), None)
    if ar is None:
        return {}
    texts = [answer.text for answer in store.answers(ar.key)]
    return {
        run.key: sum(map(str.__eq__, texts, (answer.text for answer in store.answers(run.key))))
        for run in runs
        if run is not ar and not run.temperature
    }
