"""Experiments without an engine: the file and its table in the docs, what goes on after a kill, what is measured."""

from __future__ import annotations

import itertools
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("vllm")

from vllm_twotower.experiments import runs as runs_module
from vllm_twotower.experiments.measures import measure, order_of_unmasking
from vllm_twotower.experiments.runs import AXES, Workload, run_all
from vllm_twotower.experiments.schema import Experiment, ExperimentConfig, ProblemsConfig, load_experiment
from vllm_twotower.experiments.store import Answer, Store
from vllm_twotower.experiments.tasks import Task
from vllm_twotower.progress import progress
from vllm_twotower.training.config import TrainConfigError

REPOSITORY = Path(__file__).parents[2]
FILES = sorted((REPOSITORY / "configs" / "experiments").glob("*.yaml"))
SWEEP = {"name": "threshold", "confidence_threshold": [0.8, 1.0]}


def experiment(folder: Path, **content: Any) -> Experiment:
    file = folder / "file.yaml"
    defaults = {"output": str(folder / "out"), "problems": {"count": 4}, "sweeps": [SWEEP]}
    file.write_text(yaml.safe_dump(defaults | content))
    return load_experiment(file)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_files_that_come_with_it_can_be_read(file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ProblemsConfig, "tasks", lambda self: [Task("1 + 1 =", " 2")])  # its data may lie elsewhere
    names = {run.sweep for run in load_experiment(file).runs}
    assert {"autoregressive", "verified", "threshold", "steps"} <= names
    chosen = {name for run in load_experiment(file).runs for name in run.chosen}
    assert {
        "confidence_threshold",
        "max_steps",
        "canvas_length",
        "temperature",
        "strategy",
        "mode",
        "ablation",
    } <= chosen


def test_a_sweep_is_all_combinations(tmp_path: Path):
    sweep = SWEEP | {"max_steps": [16, 32], "strategy": "confidence_unmasking"}
    made = experiment(tmp_path, sweeps=[sweep]).runs
    assert [run.label for run in made] == [
        f"threshold {threshold}, at most {steps} passes" for threshold in ("0.8", "1") for steps in (16, 32)
    ]
    assert made[0].extra_args == {
        "diffusion_confidence_threshold": 0.8,
        "diffusion_max_steps": 16,
        "diffusion_strategy": "confidence_unmasking",
    }


def test_engines_of_widths_and_ablations(tmp_path: Path):
    sweeps = [
        {"name": "width", "canvas_length": [8, 32]},
        {"name": "ablation", "ablation": [{}, {"time": 0.5, "skip_denoiser_layers": [1, 2]}, {"mamba_seed": False}]},
    ]
    made = experiment(tmp_path, sweeps=sweeps, engine={"additional_config": {"twotower": {"draft_steps": 2}}}).runs
    assert [run.engine_options.get("diffusion_config") for run in made[:2]] == [{"canvas_length": 32}] * 2
    assert made[0].extra_args == {"diffusion_canvas_length": 8, "diffusion_max_steps": 8}
    assert [run.label for run in made[2:]] == ["as trained", "t always 0.5, without layers 1, 2", "no Mamba seed"]
    of_engine = [run.engine_options["additional_config"]["twotower"] for run in made[2:]]
    assert [one.get("ablation") for one in of_engine] == [None, made[3].chosen["ablation"], {"mamba_seed": False}]
    assert all(one["draft_steps"] == 2 for one in of_engine)


def test_runs_that_are_the_same_have_one_key(tmp_path: Path):
    sweeps = [SWEEP, {"name": "steps", "max_steps": [16, 8]}, {"name": "ablation", "ablation": {}}]
    first, _, steps, other_steps, whole = experiment(tmp_path, sweeps=sweeps).runs
    assert first.key == steps.key == whole.key != other_steps.key
    assert first.key != experiment(tmp_path, sweeps=sweeps, max_tokens=4).runs[0].key
    assert first.key != experiment(tmp_path, sweeps=sweeps, problems={"count": 5}).runs[0].key


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"outptu": "x"}, ("unknown key outptu", "output")),
        ({"problems": {"cuont": 3}}, ("unknown key problems.cuont", "count")),
        ({"problems": {"families": ["sums"]}}, ("problems.families has ['sums']", "addition")),
        ({"problems": {"file": "no.jsonl"}}, ("problems.file is no.jsonl",)),
        ({"max_tokens": 0}, ("max_tokens is 0",)),
        ({"sweeps": []}, ("sweeps is empty",)),
        ({"sweeps": [SWEEP, SWEEP]}, ("sweeps[1].name is 'threshold'", "of its own")),
        ({"sweeps": [SWEEP | {"threshold": 1}]}, ("unknown key sweeps[0].threshold", "confidence_threshold")),
        (
            {"sweeps": [SWEEP | {"confidence_threshold": [0.5, 2]}]},
            ("sweeps[0]", "confidence_threshold=2", "at most 1"),
        ),
        ({"sweeps": [SWEEP | {"confidence_threshold": []}]}, ("sweeps[0].confidence_threshold has no value",)),
        ({"sweeps": [SWEEP | {"mode": ["ar"]}]}, ("sweeps[0]", "has no meaning with diffusion_mode 'ar'")),
        ({"sweeps": [SWEEP | {"temperature": -1}]}, ("sweeps[0].temperature is -1",)),
        ({"sweeps": [SWEEP | {"seed": 1}]}, ("sweeps[0].seed is 1", "temperature")),
        ({"sweeps": [SWEEP | {"ablation": "time"}]}, ("sweeps[0].ablation is 'time'", "mapping")),
        ({"engine": {"additional_config": {"twotower": {"thresh": 1}}}}, ("'thresh'", "confidence_threshold")),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else None,
)
def test_mistakes_are_named(tmp_path: Path, content: dict[str, Any], words: tuple[str, ...]):
    with pytest.raises(TrainConfigError) as error:
        experiment(tmp_path, **content)
    assert [word for word in words if word not in str(error.value)] == []


def test_the_docs_have_every_key():
    text = (REPOSITORY / "docs" / "experiments.md").read_text(encoding="utf-8").partition("## Ablations")[0]
    found = set(re.findall(r"^\| `([a-z_.]+)` \|", text, flags=re.MULTILINE))
    known = {field.name for field in fields(ExperimentConfig)} - {"problems", "sweeps"}
    known |= {f"problems.{field.name}" for field in fields(ProblemsConfig)}
    assert found == known | {f"sweeps.{name}" for name in ("name", "engine", *AXES)}


def test_a_file_of_tasks(tmp_path: Path):
    file = tmp_path / "tasks.jsonl"
    file.write_text('{"prompt": "2 + 2 =", "answer": " The answer is 4."}\n{"prompt": "Say hi.", "answer": "hi"}\n')
    sums, word = experiment(tmp_path, problems={"file": str(file)}).workload.tasks
    assert sums.is_right("2 and 2 make 4. The answer is 4.\nQuestion: ")
    assert not sums.is_right("The answer is 5.")
    assert word.is_right(" hi\n")
    assert not word.is_right("hi there")
    file.write_text('{"prompt": "Say hi."}\n')
    with pytest.raises(ValueError, match=r"tasks.jsonl, line 1: .*'answer'"):
        experiment(tmp_path, problems={"file": str(file)})


def answer(problem: int, decided_in: list[int | None], *blocks: dict[str, int]) -> Answer:
    return Answer(problem, "text", problem == 0, decided_in, list(blocks))


def test_a_line_cut_by_a_kill_is_written_anew(tmp_path: Path):
    store = Store(tmp_path)
    with store.appending("run") as answers:
        answers.add(answer(0, [1]))
        answers.add(answer(1, [1]))
    store.put("run", {"result": 1})
    for file in (tmp_path / "answers" / "run.jsonl", tmp_path / "results.jsonl"):
        with file.open("a") as stream:
            stream.write('{"problem": 2, "te')
    again = Store(tmp_path)
    assert again.get("run") == {"key": "run", "result": 1}
    assert again.answers("run") == [answer(0, [1]), answer(1, [1])]
    with again.appending("run") as answers:
        answers.add(answer(2, [1]))
    again.put("other", {})
    assert len(Store(tmp_path).answers("run")) == 3
    assert Store(tmp_path).get("other") == {"key": "other"}


class _Killed(Exception):
    pass


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    made = experiment(tmp_path, sweeps=[SWEEP, {"name": "ablation", "ablation": {"time": 0.5}}, SWEEP | {"name": "b"}])
    asked: list[tuple[str, int]] = []

    def answer_some(run, problems, store, engines, bar, most=3):
        with store.appending(run.key) as answers:
            for problem in problems:
                if len(asked) == most:
                    raise _Killed
                asked.append((run.label, problem))
                answers.add(answer(problem, [1, 1], {"start": 0, "tokens": 2, "passes": 1}))
                bar.update()

    monkeypatch.setattr(runs_module, "_answer", answer_some)
    with pytest.raises(_Killed):
        run_all(made.runs, Store(made.output), None)
    monkeypatch.setattr(runs_module, "_answer", lambda *args: answer_some(*args, most=100))
    results = run_all(made.runs, Store(made.output), None)
    labels = ("threshold 0.8", "threshold 1", "ablation")
    assert asked == list(itertools.product(labels, range(4)))  # each once, runs of one engine together
    assert {one.tokens for one in results.values()} == {8}
    assert run_all(made.runs, Store(made.output), None) == results
    assert len(asked) == 12
    assert "threshold: threshold 0.8 (1 of 3)" in capsys.readouterr().err


def test_a_changed_checkpoint_is_measured_anew(tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = Workload(str(tmp_path), [])
    assert before.key == Workload(str(tmp_path), []).key
    (tmp_path / "model.safetensors").write_bytes(b"12")
    assert before.key != Workload(str(tmp_path), []).key


@pytest.mark.parametrize(
    ("decided_in", "tau"),
    [([1, 2, 3], 1), ([3, 2, 1], -1), ([1, 1, 1], None), ([1], None), ([1, 1, 2], 2 / 6**0.5), ([1, 2, 1], 0)],
)
def test_order_of_unmasking(decided_in: list[int], tau: float | None):
    assert order_of_unmasking(decided_in) == (None if tau is None else pytest.approx(tau))


def test_what_is_measured():
    tasks = [Task("", "", "a"), Task("", "", "b")]
    block = {"start": 0, "tokens": 3, "passes": 2}
    found = measure(tasks, [answer(0, [1, 2, 2, 1], block, block | {"start": 3, "tokens": 1, "passes": 1}),
                            answer(1, [None, None])])  # fmt: skip
    assert (found.right, found.tokens, found.passes) == (1, 6, 3 + 2)
    assert found.right_by_family == {"a": [1, 1], "b": [0, 1]}
    assert found.passes_per_block == {1: 1, 2: 1}
    assert found.unmasking == [[2, 0, 0], [0, 1, 1]]
    assert (found.tau, found.ordered_blocks) == (pytest.approx(2 / 6**0.5), 1)
    assert found.mean_passes_per_block == 1.5


def test_agreement_is_conditional():
    """The first draft's third token was another one; of the second two were right, and behind them the text ended."""
    rejected = {"start": 1, "tokens": 3, "passes": 1, "drafted": 15, "accepted": 2}
    ended = {"start": 4, "tokens": 3, "passes": 2, "drafted": 15, "accepted": 2}
    found = measure([Task("", "")], [answer(0, [None, 1, 1, None, 1, 2, None], rejected, ended)])
    assert found.agreement == [[2, 2], [2, 2], [0, 1]]
    assert (found.drafts, found.accepted, found.accepted_per_draft) == (2, 4, 2)
    assert found.passes == 1 + (1 + 1) + (2 + 1)  # the prompt's, then drafts and their verification
    assert found.unmasking == []


def test_progress_without_a_terminal_is_plain_lines(capsys: pytest.CaptureFixture):
    assert list(progress(range(3), "counting", "numbers")) == [0, 1, 2]
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("counting: 0 of 3 numbers")
    assert re.fullmatch(r"counting: 3 of 3 numbers, 00:00 gone, \S+ left", last)
