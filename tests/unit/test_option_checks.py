"""Options: defaults, what is allowed, and that every refusal names the option and its value."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from vllm_twotower.options import MODES, EngineOptions, RequestError, RequestOptions, validate_sampling_params

ENGINE = EngineOptions()


def resolve(additional_config: object = None, canvas_length: int = 16, steps: int | None = None) -> EngineOptions:
    return EngineOptions.resolve(additional_config, canvas_length, steps, 320)


def model_config(engine: EngineOptions = ENGINE) -> SimpleNamespace:
    config = SimpleNamespace(hf_config=SimpleNamespace(), skip_tokenizer_init=False)
    engine.store(config)
    return config


def test_defaults() -> None:
    assert resolve() == EngineOptions(16, 16, 0.8, 3, "mask_diffusion", False, 1, "auto", 64)
    assert RequestOptions.parse(None, resolve(None, 16, 8)).max_steps == 8
    assert RequestOptions.parse(None, ENGINE) == RequestOptions(
        "mask_diffusion", 0.8, 16, 16, "confidence_unmasking", "linear", False, "confidence", False, 1
    )


def test_engine_options_are_taken() -> None:
    own = {
        "mode": "ar",
        "lossless": True,
        "draft_steps": 2,
        "denoise_steps_per_engine_step": 4,
        "prompt_tokens_beside_blocks": 100,
    }
    given = {"twotower": {"confidence_threshold": 0.5, "mask_token_id": 7, **own}}
    assert resolve(given, 32, 8) == EngineOptions(32, 8, 0.5, 7, "ar", True, 2, 4, 100)
    assert RequestOptions.parse(None, resolve(given)).mode == "ar"
    assert resolve({"twotower": {"denoise_steps_per_engine_step": "auto"}}).denoise_steps_per_engine_step == "auto"
    assert EngineOptions.resolve(None, 16, None, 320, mask_token_id=9).mask_token_id == 9  # the checkpoint's own
    assert EngineOptions.of(model_config(resolve(given))) == resolve(given)


def test_a_process_that_is_sent_the_options_loads_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a replica of Ray Serve, which is sent a finished configuration, would run without the patches."""
    calls = []
    monkeypatch.setattr("vllm.plugins.load_general_plugins", lambda: calls.append(True))
    sent = pickle.loads(pickle.dumps(model_config().hf_config))
    assert EngineOptions.of(SimpleNamespace(hf_config=sent)) == ENGINE
    assert calls == [True]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"gamma": 1}, ("gamma", "confidence_threshold")),
        ({"confidence_threshold": 0}, ("confidence_threshold", "0")),
        ({"confidence_threshold": 1.1}, ("confidence_threshold", "1.1")),
        ({"mask_token_id": 320}, ("mask_token_id", "320", "319")),
        ({"mask_token_id": "3"}, ("mask_token_id", "'3'")),
        ({"commit": "lazy"}, ("commit", "lazy", "removed", "denoise_steps_per_engine_step")),
        ({"mode": "diffusion"}, ("mode", "'diffusion'", "mask_diffusion")),
        ({"mode": "mock_ar"}, ("mode", "'mock_ar'", "removed", "generate_mock_ar")),
        ({"denoise_steps_per_engine_step": 0}, ("denoise_steps_per_engine_step", "0", "auto", "at least 1")),
        ({"denoise_steps_per_engine_step": "all"}, ("denoise_steps_per_engine_step", "'all'", "auto")),
        ({"lossless": "yes"}, ("lossless", "'yes'", "true or false")),
        ({"draft_steps": 0}, ("draft_steps", "0", "from 1 to 1024")),
        ({"prompt_tokens_beside_blocks": 0}, ("prompt_tokens_beside_blocks", "0", "at least 1")),
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
    options = RequestOptions.parse(
        {
            "diffusion_strategy": "predict_and_noise",
            "diffusion_noise_schedule": "cosine",
            "diffusion_adaptive_unmasking": 1,  # as the server passes true on
            "diffusion_remasking": "margin",
        },
        ENGINE,
    )
    assert options == RequestOptions("mask_diffusion", 0.8, 16, 16, "predict_and_noise", "cosine", True, "margin")
    assert RequestOptions.parse({"diffusion_mode": "ar"}, ENGINE).canvas_length == 1


@pytest.mark.parametrize("steps", [32, 1024])
def test_a_request_may_take_more_steps_than_the_default(steps: int) -> None:
    assert RequestOptions.parse({"diffusion_max_steps": steps}, ENGINE).max_steps == steps


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
        ("diffusion_max_steps", 1025),
        ("diffusion_max_steps", 2.5),
        ("diffusion_canvas_length", 0),
        ("diffusion_canvas_length", 17),
        ("diffusion_canvas_length", True),
        ("diffusion_strategy", "magic"),
        ("diffusion_strategy", ["posterior"]),
        ("diffusion_noise_schedule", "quadratic"),
        ("diffusion_adaptive_unmasking", "true"),
        ("diffusion_adaptive_unmasking", 2),
        ("diffusion_remasking", 1),
        ("diffusion_draft_steps", 0),
        ("diffusion_draft_steps", "auto"),
        ("diffusion_lossless", "true"),
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
        with pytest.raises(RequestError, match=f"{name}.*'ar'"):
            RequestOptions.parse({"diffusion_mode": "ar", name: value}, ENGINE)


@pytest.mark.parametrize(
    ("given", "name", "words"),
    [
        ({"diffusion_mode": "verified", "diffusion_max_steps": 4}, "diffusion_max_steps", "diffusion_draft_steps"),
        ({"diffusion_mode": "verified", "diffusion_lossless": True}, "diffusion_lossless", "'verified'"),
        ({"diffusion_lossless": False}, "diffusion_lossless", "'mask_diffusion'"),
        ({"diffusion_draft_steps": 2}, "diffusion_draft_steps", "'mask_diffusion'"),
        ({"diffusion_mode": "auto", "diffusion_draft_steps": 2}, "diffusion_draft_steps", "diffusion_lossless false"),
        (
            {"diffusion_mode": "auto", "diffusion_lossless": 1, "diffusion_max_steps": 4},
            "diffusion_max_steps",
            "'auto' and diffusion_lossless true; use diffusion_draft_steps",
        ),
    ],
)
def test_options_of_another_mode_are_refused(given: dict[str, object], name: str, words: str) -> None:
    with pytest.raises(RequestError, match=f"{name}=.*has no meaning with .*{words}"):
        RequestOptions.parse(given, ENGINE)


def test_what_a_request_is_drafted_with() -> None:
    """Its own options, or the engine's; an ``auto`` request only if it is to be lossless."""
    engine = EngineOptions(mode="auto", lossless=True, draft_steps=2)
    options = RequestOptions.parse(None, engine)
    assert (options.verifies, options.fills_blocks, options.passes_per_block) == (True, False, 2)
    options = RequestOptions.parse({"diffusion_lossless": 0}, engine)
    assert (options.verifies, options.fills_blocks, options.passes_per_block) == (False, True, 16)
    options = RequestOptions.parse({"diffusion_mode": "verified", "diffusion_draft_steps": 3}, engine)
    assert (options.verifies, options.lossless, options.passes_per_block) == (True, False, 3)
    options = RequestOptions.parse({"diffusion_mode": "mask_diffusion"}, engine)
    assert (options.verifies, options.lossless, options.fills_blocks) == (False, False, True)


@pytest.mark.parametrize("mode", ["auto", "verified"])
def test_blocks_of_one_token_are_no_choice(mode: str) -> None:
    with pytest.raises(RequestError, match=f"{mode}.*canvas length of 1"):
        EngineOptions.resolve({"twotower": {"mode": mode}}, 1, 1, 320)
    with pytest.raises(RequestError, match=f"{mode}.*canvas length of 1"):
        RequestOptions.parse({"diffusion_mode": mode}, EngineOptions(canvas_length=1))
    with pytest.raises(RequestError, match="diffusion_canvas_length=1.*from 2 to 16"):
        RequestOptions.parse({"diffusion_mode": mode, "diffusion_canvas_length": 1}, ENGINE)


@pytest.mark.parametrize(
    ("strategy", "name", "value"),
    [
        ("posterior", "diffusion_confidence_threshold", 0.5),
        ("posterior", "diffusion_remasking", "margin"),
        ("predict_and_noise", "diffusion_confidence_threshold", 0.5),
        ("confidence_unmasking", "diffusion_noise_schedule", "linear"),
        ("confidence_unmasking", "diffusion_adaptive_unmasking", True),
    ],
)
def test_options_of_another_strategy_are_refused(strategy: str, name: str, value: object) -> None:
    with pytest.raises(RequestError, match=f"{name}.*{strategy}"):
        RequestOptions.parse({"diffusion_strategy": strategy, name: value}, ENGINE)


@pytest.mark.parametrize(
    ("name", "value", "modes"),
    [
        ("structured_outputs", StructuredOutputsParams(regex="a+"), ("mask_diffusion",)),
        ("thinking_token_budget", 3, MODES),
        ("trace_decode_token_ids", [5], MODES),
    ],
)
def test_sampling_parameters_without_a_meaning_are_refused(name: str, value: object, modes: tuple[str, ...]) -> None:
    for mode in MODES:
        params = SamplingParams(**{name: value}, extra_args={"diffusion_mode": mode})
        if mode in modes:
            with pytest.raises(VLLMValidationError, match=name):
                validate_sampling_params(params, model_config())
        else:
            validate_sampling_params(params, model_config())


def test_the_mask_token_alone_is_no_choice() -> None:
    for allowed in ([3], [3, 3]):
        with pytest.raises(VLLMValidationError, match="allowed_token_ids"):
            validate_sampling_params(SamplingParams(allowed_token_ids=allowed), model_config())
    validate_sampling_params(SamplingParams(allowed_token_ids=[3, 4]), model_config())
