"""The engine's option ``ablation``: tokens of the plain model with the same thing taken away, and who may use it."""

from __future__ import annotations

import random
from typing import Any

import golden_data
import pytest
from ablated_reference import ablated
from engines import assert_idle, generate, running_engine, tokens_of
from random_requests import draw_prompt
from vllm import EngineArgs, SamplingParams

from vllm_twotower.experiments.cli import check_engines
from vllm_twotower.experiments.runs import Run, Workload, ablation_label
from vllm_twotower.reference import TwoTowerModel, generate_ar, generate_mask_diffusion

DEV_MODE = "VLLM_SERVER_DEV_MODE"
WIDTHS = (16, 16, 7, 12)
"""Of the requests' canvases: rows of a pass are as wide as the widest, and the rest of the others is inert."""


@pytest.fixture
def developer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEV_MODE, "1")


@pytest.mark.parametrize(
    ("checkpoint", "ablation"),
    [
        ("A", {"mamba_seed": False}),
        ("A", {"context_kv": False}),
        ("B", {"time": 0.5}),
        ("B", {"experts_per_token": 1}),
        ("B", {"skip_denoiser_layers": [0, 3, 9]}),
        ("C", {"skip_denoiser_layers": [1]}),
        ("A", {"mamba_seed": False, "context_kv": False, "time": 1, "experts_per_token": 4}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_tokens_are_the_plain_models(checkpoint: str, ablation: dict[str, Any], developer: None) -> None:
    folder = golden_data.checkpoint(checkpoint)
    whole = TwoTowerModel.from_pretrained(folder)
    plain = ablated(whole, **ablation)
    rng = random.Random(0)
    prompts = [draw_prompt(rng, (5, 17, 40)) for _ in WIDTHS]
    request = {"temperature": 0, "max_tokens": 32, "ignore_eos": True}
    settings = [{"diffusion_canvas_length": width, "diffusion_confidence_threshold": 0.02} for width in WIDTHS]
    with running_engine(folder, twotower={"ablation": ablation}) as llm:
        found = tokens_of(generate(llm, prompts, [SamplingParams(**request, extra_args=one) for one in settings]))
        ar = SamplingParams(**request, extra_args={"diffusion_mode": "ar"})
        drafts = SamplingParams(**request, extra_args={"diffusion_mode": "verified"})
        of_context = tokens_of(generate(llm, prompts[:2] * 2, [ar, ar, drafts, drafts]))
        assert_idle(llm)
    expected, unchanged = (
        [
            tuple(generate_mask_diffusion(model, prompt, 32, block_size=width, gamma=0.02).tokens)
            for prompt, width in zip(prompts, WIDTHS, strict=True)
        ]
        for model in (plain, whole)
    )
    assert found == expected
    assert expected != unchanged
    # The context tower stays whole, and accepts what it would have given.
    assert of_context == [tuple(generate_ar(whole, prompt, 32).tokens) for prompt in prompts[:2]] * 2


def config(ablation: Any, checkpoint: str = "A", **twotower: Any):
    return EngineArgs(
        model=str(golden_data.checkpoint(checkpoint)),
        dtype="float32",
        additional_config={"twotower": {"ablation": ablation, **twotower}},
    ).create_engine_config()


def test_a_normal_server_refuses() -> None:
    with pytest.raises(ValueError, match=rf"ablation=\{{'time': 0.5\}}: .*{DEV_MODE}=1"):
        config({"time": 0.5})


@pytest.mark.parametrize(
    ("checkpoint", "ablation", "words"),
    [
        ("A", {"seed": False}, ("ablation.seed=False", "mamba_seed, context_kv")),
        ("A", {"mamba_seed": 0}, ("ablation.mamba_seed=0", "true or false")),
        ("A", {"time": 0}, ("ablation.time=0", "greater than 0")),
        ("A", {"time": "0.5"}, ("ablation.time='0.5'", "at most 1")),
        ("A", {"experts_per_token": 5}, ("ablation.experts_per_token=5", "from 1 to 4")),
        ("C", {"experts_per_token": 1}, ("ablation.experts_per_token=1", "no experts")),
        ("A", {"skip_denoiser_layers": [1, 4]}, ("skip_denoiser_layers=[1, 4]", "from 0 to 3")),
        ("A", {"skip_denoiser_layers": 1}, ("skip_denoiser_layers=1", "list")),
        ("A", [1], ("ablation=[1]", "mapping")),
    ],
)
def test_bad_values_are_named(checkpoint: str, ablation: Any, words: tuple[str, ...], developer: None) -> None:
    with pytest.raises(ValueError) as error:
        config(ablation, checkpoint)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ({"max_num_seq": 4}, "the engine of sweep 'all', as trained: .*max_num_seq"),
        ({}, r"the engine of sweep 'all', experts a token: 9: .*ablation.experts_per_token=9: .*from 1 to 4"),
    ],
)
def test_an_experiment_looks_at_all_engines_before_the_first(engine: dict[str, Any], words: str, developer: None):
    workload = Workload(str(golden_data.checkpoint("A")), [])
    ablations = ({}, {"experts_per_token": 9})
    with pytest.raises(ValueError, match=words):
        check_engines([Run(workload, "all", ablation_label(one), {"ablation": one}, engine) for one in ablations])


def test_the_context_tower_alone_has_no_denoiser(developer: None) -> None:
    with pytest.raises(ValueError, match=r"ablation=\{'time': 0.5\}: needs the denoiser"):
        config({"time": 0.5}, towers="context")
