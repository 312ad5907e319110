"""Options: defaults, what is allowed, and that every refusal names the option and its value."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from vllm_twotower.config import EngineOptions, RequestError, RequestOptions, validate_sampling_params

ENGINE = EngineOptions()


def resolve(additional_config: object = None, canvas_length: int = 16, steps: int | None = None) -> EngineOptions:
    return EngineOptions.resolve(additional_config, canvas_length, steps, None, 320)


def model_config(engine: EngineOptions = ENGINE) -> SimpleNamespace:
    config = SimpleNamespace(hf_config=SimpleNamespace())
    engine.store(config)
    return config


def test_defaults() -> None:
    assert resolve() == EngineOptions(16, 16, 0.8, 3, "lazy")
    assert RequestOptions.parse(None, ENGINE) == RequestOptions("mask_diffusion", 0.8, 16, 16, "confidence_unmasking")


def test_engine_options_are_taken() -> None:
    given = {"twotower": {"confidence_threshold": 0.5, "mask_token_id": 7, "commit": "separate"}}
    assert resolve(given, 32, 8) == EngineOptions(32, 8, 0.5, 7, "separate")
    assert EngineOptions.resolve(None, 16, None, 9, 320).mask_token_id == 9  # the checkpoint's own
    assert EngineOptions.of(model_config(resolve(given))) == resolve(given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"gamma": 1}, ("gamma", "confidence_threshold")),
        ({"confidence_threshold": 0}, ("confidence_threshold", "0")),
        ({"confidence_threshold": 1.1}, ("confidence_threshold", "1.1")),
        ({"mask_token_id": 320}, ("mask_token_id", "320", "319")),
        ({"mask_token_id": "3"}, ("mask_token_id", "'3'")),
        ({"commit": "eager"}, ("commit", "eager", "lazy", "separate")),
        ([1], ("twotower", "[1]")),
    ],
)
def test_bad_engine_options_are_named(given: object, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:
        resolve({"twotower": given})
    assert all(word in str(error.value) for word in words)


def test_request_options_are_taken() -> None:
    options = RequestOptions.parse(
        {
            "diffusion_mode": "mask_diffusion",
            "diffusion_confidence_threshold": 1,
            "diffusion_max_steps": 4,
            "diffusion_canvas_length": 8,
            "diffusion_strategy": "confidence_unmasking",
        },
        ENGINE,
    )
    assert options == RequestOptions("mask_diffusion", 1.0, 4, 8, "confidence_unmasking")
    assert RequestOptions.parse({"diffusion_mode": "ar"}, ENGINE).canvas_length == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("diffusion_mode", "autoregressive"),
        ("diffusion_mode", "mock_ar"),
        ("diffusion_confidence_threshold", 0),
        ("diffusion_confidence_threshold", 1.5),
        ("diffusion_confidence_threshold", "0.8"),
        ("diffusion_confidence_threshold", True),
        ("diffusion_confidence_threshold", float("nan")),
        ("diffusion_max_steps", 0),
        ("diffusion_max_steps", 17),
        ("diffusion_max_steps", 2.5),
        ("diffusion_canvas_length", 0),
        ("diffusion_canvas_length", 17),
        ("diffusion_canvas_length", True),
        ("diffusion_strategy", "posterior"),
        ("diffusion_temperature", 1),
        ("something", "else"),
    ],
)
def test_bad_request_options_are_named(name: str, value: object) -> None:
    with pytest.raises(RequestError) as error:
        RequestOptions.parse({name: value}, ENGINE)
    assert name in str(error.value)
    assert repr(value) in str(error.value)


def test_block_options_have_no_meaning_for_autoregressive_requests() -> None:
    for name, value in (("diffusion_confidence_threshold", 0.5), ("diffusion_canvas_length", 8)):
        with pytest.raises(RequestError, match=name):
            RequestOptions.parse({"diffusion_mode": "ar", name: value}, ENGINE)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("presence_penalty", 0.5),
        ("frequency_penalty", -0.5),
        ("repetition_penalty", 1.1),
        ("min_tokens", 3),
        ("logit_bias", {5: 1.0}),
        ("allowed_token_ids", [4, 5]),
        ("bad_words", ["no"]),
        ("logprobs", 0),
        ("prompt_logprobs", 1),
        ("structured_outputs", StructuredOutputsParams(regex="a+")),
    ],
)
def test_sampling_parameters_without_a_meaning_are_refused(name: str, value: object) -> None:
    with pytest.raises(VLLMValidationError, match=name):
        validate_sampling_params(SamplingParams(**{name: value}), model_config())


def test_supported_sampling_parameters_are_let_through() -> None:
    params = SamplingParams(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, seed=3, n=2, stop=["x"], max_tokens=9)
    validate_sampling_params(params, model_config())
    assert params.extra_args is None


def test_an_autoregressive_request_gets_a_canvas_of_one_token() -> None:
    shared = {"diffusion_mode": "ar"}
    params = SamplingParams(extra_args=shared)
    validate_sampling_params(params, model_config())
    assert params.extra_args == {"diffusion_mode": "ar", "diffusion_canvas_length": 1}
    assert shared == {"diffusion_mode": "ar"}
    validate_sampling_params(params, model_config())  # the same object again
