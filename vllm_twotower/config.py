"""Options of the engine and of a request: names, defaults, what is allowed, and the words of every refusal.

Engine-wide options come from vLLM's ``--diffusion-config`` and from ``--additional-config '{"twotower": {...}}'``; a
request's options travel in ``SamplingParams.extra_args`` (the server's ``vllm_xargs``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

from vllm_twotower.checkpoint import DEFAULT_CANVAS_LENGTH, DEFAULT_MASK_TOKEN_ID

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.sampling_params import SamplingParams

ADDITIONAL_CONFIG_KEY = "twotower"
COMMIT_POLICIES = ("lazy", "separate")
MODES = ("mask_diffusion", "ar")
STRATEGIES = ("confidence_unmasking",)

Mode = Literal["mask_diffusion", "ar"]


@dataclass(frozen=True)
class EngineOptions:
    """What holds for every request of an engine.

    ``canvas_length`` (S) tokens are denoised at once in at most ``max_denoising_steps`` passes; a request may ask for
    less. ``commit`` says when the context tower reads a finished block: ``lazy`` in the step that starts the next one
    (the last block of a request is never read), ``separate`` in a step of its own, before the block is returned.
    """

    canvas_length: int = DEFAULT_CANVAS_LENGTH
    max_denoising_steps: int = DEFAULT_CANVAS_LENGTH
    confidence_threshold: float = 0.8
    mask_token_id: int = DEFAULT_MASK_TOKEN_ID
    commit: str = "lazy"

    @classmethod
    def resolve(
        cls,
        additional_config: Mapping[str, Any] | None,
        canvas_length: int,
        max_denoising_steps: int | None,
        mask_token_id: int | None,
        vocab_size: int,
    ) -> EngineOptions:
        """Builds the options from vLLM's configuration; raises ValueError naming the option, its value, and the rule.

        ``canvas_length`` and ``max_denoising_steps`` are those of ``--diffusion-config``, ``mask_token_id`` that of
        the checkpoint's configuration.
        """
        given = (additional_config or {}).get(ADDITIONAL_CONFIG_KEY, {})
        if not isinstance(given, Mapping):
            raise ValueError(
                f"additional_config['{ADDITIONAL_CONFIG_KEY}'] must be a mapping of options, got {given!r}"
            )
        checks: dict[str, Callable[[str, Any], Any]] = {
            "confidence_threshold": _threshold,
            "mask_token_id": lambda name, value: _integer(name, value, 0, vocab_size - 1),
            "commit": lambda name, value: _choice(name, value, COMMIT_POLICIES),
        }
        chosen: dict[str, Any] = {} if mask_token_id is None else {"mask_token_id": mask_token_id}
        for name, value in given.items():
            if name not in checks:
                raise ValueError(
                    f"unknown option {name!r} in additional_config['{ADDITIONAL_CONFIG_KEY}']; "
                    f"known are {', '.join(checks)}"
                )
            chosen[name] = checks[name](f"additional_config['{ADDITIONAL_CONFIG_KEY}'].{name}", value)
        steps = canvas_length if max_denoising_steps is None else max_denoising_steps
        _integer("diffusion_config.max_denoising_steps", steps, 1, None)
        return cls(canvas_length=canvas_length, max_denoising_steps=steps, **chosen)

    @classmethod
    def of(cls, model_config: ModelConfig) -> EngineOptions:
        """The options that :meth:`store` left in a model configuration."""
        return cls(**model_config.hf_config.twotower)

    def store(self, model_config: ModelConfig) -> None:
        """Keeps the options where every process of the engine finds them."""
        model_config.hf_config.twotower = asdict(self)
        model_config.hf_config.canvas_length = self.canvas_length


@dataclass(frozen=True)
class RequestOptions:
    """The TwoTower options of one request, complete and checked."""

    mode: Mode
    confidence_threshold: float
    max_steps: int
    canvas_length: int
    strategy: str

    @classmethod
    def parse(cls, extra_args: Mapping[str, Any] | None, engine: EngineOptions) -> RequestOptions:
        """Reads ``extra_args``; raises ValueError naming the option, its value, and what is allowed.

        An autoregressive request has a canvas of one token and ignores no option: those of the block sampler are
        refused for it.
        """
        given = {name: value for name, value in (extra_args or {}).items() if value is not None}
        unknown = sorted(set(given) - set(_REQUEST_OPTIONS))
        if unknown:
            raise RequestError(
                unknown[0],
                given[unknown[0]],
                f"unknown option in extra_args; known are {', '.join(_REQUEST_OPTIONS)}",
            )
        mode = _choice("diffusion_mode", given.get("diffusion_mode", "mask_diffusion"), MODES)
        if mode == "ar":
            for name in given:
                if name != "diffusion_mode" and (name, given[name]) != ("diffusion_canvas_length", 1):
                    raise RequestError(name, given[name], "has no meaning with diffusion_mode 'ar'")
            return cls(mode, engine.confidence_threshold, 1, 1, STRATEGIES[0])
        return cls(
            mode=mode,
            confidence_threshold=_threshold(
                "diffusion_confidence_threshold",
                given.get("diffusion_confidence_threshold", engine.confidence_threshold),
            ),
            max_steps=_integer(
                "diffusion_max_steps",
                given.get("diffusion_max_steps", engine.max_denoising_steps),
                1,
                engine.max_denoising_steps,
            ),
            canvas_length=_integer(
                "diffusion_canvas_length",
                given.get("diffusion_canvas_length", engine.canvas_length),
                1,
                engine.canvas_length,
            ),
            strategy=_choice("diffusion_strategy", given.get("diffusion_strategy", STRATEGIES[0]), STRATEGIES),
        )


# The names of RequestOptions' fields are the options' names without the prefix.
_REQUEST_OPTIONS = tuple("diffusion_" + field.name for field in fields(RequestOptions))


class RequestError(ValueError):
    """A request option that cannot be honoured: its name, its value, and why."""

    def __init__(self, name: str, value: Any, reason: str):
        super().__init__(f"{name}={value!r}: {reason}")
        self.name, self.value = name, value


def _choice(name: str, value: Any, allowed: tuple[str, ...]) -> Any:
    if value not in allowed:
        raise RequestError(name, value, f"must be one of {', '.join(map(repr, allowed))}")
    return value


def _integer(name: str, value: Any, low: int, high: int | None) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise RequestError(
            name, value, f"must be an integer {f'from {low} to {high}' if high else f'of at least {low}'}"
        )
    return value


def _threshold(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value <= 1:
        raise RequestError(name, value, "must be a number greater than 0 and at most 1")
    return float(value)


# Sampling parameters of vLLM that a TwoTower request must leave at their defaults: name, and whether it is set.
_BLOCK_REASON = "is not supported for this model: a block's tokens are chosen together, not one after another"
_UNSUPPORTED: dict[str, Callable[[SamplingParams], bool]] = {
    "presence_penalty": lambda p: p.presence_penalty != 0,
    "frequency_penalty": lambda p: p.frequency_penalty != 0,
    "repetition_penalty": lambda p: p.repetition_penalty != 1,
    "min_tokens": lambda p: p.min_tokens > 0,
    "logit_bias": lambda p: bool(p.logit_bias),
    "allowed_token_ids": lambda p: p.allowed_token_ids is not None,
    "bad_words": lambda p: bool(p.bad_words),
    "logprobs": lambda p: p.logprobs is not None,
    "logprob_token_ids": lambda p: p.logprob_token_ids is not None,
    "prompt_logprobs": lambda p: p.prompt_logprobs is not None,
    "prompt_logprob_token_ids": lambda p: p.prompt_logprob_token_ids is not None,
    "structured_outputs": lambda p: p.structured_outputs is not None,
    "thinking_token_budget": lambda p: p.thinking_token_budget is not None,
    "trace_decode_token_ids": lambda p: p.trace_decode_token_ids is not None,
}


def validate_sampling_params(params: SamplingParams, model_config: ModelConfig) -> None:
    """Checks a request before it is admitted, in place of vLLM's rules for diffusion models.

    Raises ``VLLMValidationError`` (HTTP 400 in the server) naming the parameter, its value and what is allowed. Gives
    an autoregressive request the one-token canvas that vLLM's scheduler reads from ``extra_args``.
    """
    from vllm.exceptions import VLLMValidationError

    try:
        for name, is_set in _UNSUPPORTED.items():
            if is_set(params):
                raise RequestError(name, getattr(params, name), _BLOCK_REASON)
        options = RequestOptions.parse(params.extra_args, EngineOptions.of(model_config))
    except RequestError as error:
        raise VLLMValidationError(str(error), parameter=error.name, value=error.value) from None
    if options.mode == "ar":
        params.extra_args = {**(params.extra_args or {}), "diffusion_canvas_length": 1}
