"""The tables of engine options in docs/engine-options.md: every row is tried, and the page is made of them.

The rows are in engine_options.yaml:

    works: option       value: starts with it; engine: in which engine below it gives the oracle's tokens;
                        shown: another test, which shows what the option does
    refused: option     value: the error matches words
    no meaning: ..., not tried: ...

``here`` says what the option does or why not, ``beside`` has options that ``value`` needs, ``since`` is the release of
vLLM that brought the option. A dot leads into a nested
configuration, ``.*`` stands for all its fields without a row.

PYTHONPATH=tests python tests/engine/test_engine_options.py    # writes the tables into docs/engine-options.md
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, fields
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("vllm")
import golden_data
from comparisons import model
from engines import assert_idle, core, generate, running_engine
from oracle import expected
from packaging.version import Version
from random_requests import draw_prompt
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.config.attention import AttentionConfig
from vllm.config.compilation import CompilationConfig
from vllm.config.diffusion import DiffusionConfig
from vllm.config.mamba import MambaConfig
from vllm.config.structured_outputs import StructuredOutputsConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams
from vllm.version import __version__ as VLLM_VERSION

from vllm_twotower.options import EngineOptions

REPOSITORY = Path(__file__).parents[2]
DOCUMENT = REPOSITORY / "docs" / "engine-options.md"
BEGIN, END = "<!-- tables: begin -->\n", "<!-- tables: end -->\n"
CHECKPOINT = golden_data.checkpoint("A")  # with experts
TINY = REPOSITORY / "models" / "tiny-twotower"  # without
VERDICTS = ("works", "refused", "no meaning", "not tried")
NESTED = {
    "additional_config.twotower": EngineOptions,
    "attention_config": AttentionConfig,
    "compilation_config": CompilationConfig,
    "diffusion_config": DiffusionConfig,
    "mamba_config": MambaConfig,
    "structured_outputs_config": StructuredOutputsConfig,
}
"""Configurations whose fields have rows of their own."""
ELSEWHERE = {"canvas_length", "custom_arguments", "max_denoising_steps", "request_metrics", "seed"}
"""Fields of EngineOptions that come from options of vLLM's."""


@pytest.fixture(autouse=True)
def no_variables_of_other_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM leaves one of its own on CPUs, which ``fail_on_environ_validation`` does not know."""
    monkeypatch.delenv("VLLM_DIST_IDENT", raising=False)


class Extension:
    """A ``worker_extension_cls``."""


@dataclass(frozen=True)
class Row:
    """One option, or several with the same verdict for the same reason."""

    group: str
    names: list[str]
    verdict: str
    here: str
    value: Any = None
    beside: dict[str, Any] = field(default_factory=dict)
    words: str = ""
    engine: int = 0
    shown: str = ""
    since: str = "0"

    def options(self) -> dict[str, Any]:
        """Arguments of ``EngineArgs``."""
        [name] = self.names
        value = reduce(lambda inner, key: {key: inner}, reversed(name.split(".")), self.value)
        return value | self.beside


def read_rows() -> list[Row]:
    text = Path(__file__).with_name("engine_options.yaml").read_text(encoding="utf-8")
    text = text.replace("{checkpoint}", str(CHECKPOINT)).replace("{tiny}", str(TINY))
    rows = []
    for group, entries in yaml.safe_load(text).items():
        for entry in entries:
            [verdict] = set(VERDICTS) & entry.keys()
            names = entry.pop(verdict)
            rows.append(Row(group, [names] if isinstance(names, str) else names, verdict, **entry))
    return rows


ROWS = read_rows()
INSTALLED = [row for row in ROWS if Version(row.since) <= Version(VLLM_VERSION)]
WORKING, REFUSED = ([row for row in INSTALLED if row.verdict == verdict] for verdict in VERDICTS[:2])


def config(**options: Any) -> VllmConfig:
    """vLLM's configuration, as both ``LLM`` and ``vllm serve`` build it."""
    options = {"model": str(CHECKPOINT), "dtype": "float32", "max_num_seqs": 4} | options
    return AsyncEngineArgs(**options).create_engine_config()


def merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Both, nested ones too."""
    both = {key: merged(one[key], other[key]) for key in one.keys() & other.keys() if isinstance(one[key], dict)}
    return one | other | both


@pytest.mark.parametrize("row", WORKING, ids=lambda row: row.names[0])
def test_works(row: Row) -> None:
    config(**row.options())
    if row.shown:
        file, _, test = row.shown.partition("::")
        assert f"\ndef {test}(" in (REPOSITORY / "tests" / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row.names[0])
def test_refused(row: Row) -> None:
    with pytest.raises(ValueError, match=row.words):
        config(**row.options())


@pytest.mark.parametrize("engine", [1, 2])
def test_tokens_are_the_oracles_with_all_options_at_once(engine: int) -> None:
    options = reduce(merged, (row.options() for row in WORKING if row.engine == engine))
    rng = random.Random(engine)
    modes = ("mask_diffusion", "ar")
    params = [
        SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, extra_args={"diffusion_mode": modes[i % 2]})
        for i in range(16)
    ]
    prompts = [draw_prompt(rng, (1, 17, 40, 150)) for _ in params]
    with running_engine(CHECKPOINT, **options) as llm:
        for _ in range(2):  # the second time prefixes are found
            for prompt, param, output in zip(prompts, params, generate(llm, prompts, params), strict=True):
                assert list(output.outputs[0].token_ids) == expected(model(), prompt, param).token_ids
        if "structured_outputs_config" in options:
            grammar = StructuredOutputsParams(regex="[a-c]{5}[0-9]{2}")
            param = SamplingParams(temperature=0, structured_outputs=grammar, extra_args={"diffusion_mode": "ar"})
            [output] = generate(llm, [[5, 60]], [param])
            assert len(output.outputs[0].text) == 7
        assert_idle(llm)


def test_priorities_without_a_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """With few pages the least urgent requests give way, in the middle of a block, and go on as if nothing was.

    Prompts and answers are token ids, and what needs a tokenizer is refused.
    """
    prompts = [draw_prompt(random.Random(i), (95, 120)) for i in range(12)]
    params = [SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)] * len(prompts)
    priorities = [i % 3 for i in range(len(prompts))]
    few_pages = {"max_model_len": 256, "kv_cache_memory_bytes": 14 * (64 << 10)}
    with running_engine(CHECKPOINT, scheduling_policy="priority", skip_tokenizer_init=True, **few_pages) as llm:
        scheduler, preempted = core(llm).scheduler, []
        preempt = scheduler._preempt_request

        def record(request: Any, *args: Any, **kwargs: Any) -> Any:
            preempted.append((request.priority, max(other.priority for other in scheduler.running)))
            return preempt(request, *args, **kwargs)

        monkeypatch.setattr(scheduler, "_preempt_request", record)
        outputs = generate(llm, prompts, params, priority=priorities)
        for prompt, param, output in zip(prompts, params, outputs, strict=True):
            assert list(output.outputs[0].token_ids) == expected(model(), prompt, param).token_ids
        grammar = StructuredOutputsParams(regex="a")
        for name, value in {"stop": ["a"], "bad_words": ["a"], "structured_outputs": grammar}.items():
            with pytest.raises((ValueError, VLLMValidationError), match="tokenizer"):
                generate(llm, prompts[:1], [SamplingParams(**{name: value}, extra_args={"diffusion_mode": "ar"})])
        assert preempted
        assert all(priority >= others for priority, others in preempted)
        assert_idle(llm)


def test_defaults_of_sampling() -> None:
    made = config(override_generation_config={"temperature": 0.5})
    assert made.model_config.get_diff_sampling_param()["temperature"] == 0.5


def test_every_option_has_a_row() -> None:
    """A new option of vLLM's fails here until somebody says what it does with a TwoTower model."""
    names = [name for row in INSTALLED for name in row.names]
    assert len(names) == len(set(names))
    top = {f.name for f in fields(AsyncEngineArgs) if not f.name.startswith("_")}
    assert {name.partition(".")[0] for name in names} == top
    for prefix, of in NESTED.items():
        rows = {name.removeprefix(f"{prefix}.") for name in names if name.startswith(f"{prefix}.")}
        known = {f.name for f in fields(of) if f.init} - (ELSEWHERE if of is EngineOptions else set())
        assert "*" in rows or known <= rows, prefix


def tables() -> str:
    lines: list[str] = []
    for group in dict.fromkeys(row.group for row in ROWS):
        lines += [f"## {group}", "", "| option | | here |", "| --- | --- | --- |"]
        for row in sorted((row for row in ROWS if row.group == group), key=lambda row: VERDICTS.index(row.verdict)):
            names = ", ".join(f"`{name}`" for name in row.names)
            lines.append(f"| {names} | {row.verdict} | {row.here} |")
        lines.append("")
    return "\n".join(lines)


def test_document_has_these_tables() -> None:
    """Otherwise: PYTHONPATH=tests python tests/engine/test_engine_options.py"""
    assert DOCUMENT.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0] == tables()


if __name__ == "__main__":
    before, rest = DOCUMENT.read_text(encoding="utf-8").split(BEGIN)
    DOCUMENT.write_text(before + BEGIN + tables() + END + rest.split(END)[1], encoding="utf-8")
