"""Options of the engine and of a request: names, defaults, what is allowed, and the words of every refusal.

Engine-wide options come from vLLM's ``--diffusion-config`` and from ``--additional-config '{"twotower": {...}}'``; a
request's options travel in ``SamplingParams.extra_args`` (the server's ``vllm_xargs``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

from vllm_twotower.architecture import DEFAULT_CANVAS_LENGTH, DEFAULT_MASK_TOKEN_ID
from vllm_twotower.trace import LEVELS, MAX_CANVAS_POSITIONS, TRACE

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.sampling_params import SamplingParams

ATTENTION_BACKENDS = ("FLASH_ATTN", "TRITON_ATTN", "CPU_ATTN")
"""vLLM's attention backends that write keys and values for a layer that shares another one's pages, and were tried."""
ATTENTION_REASON = (
    "the denoiser writes keys and values into the context tower's pages, which is known to work with "
    f"{', '.join(ATTENTION_BACKENDS)}"
)
ADDITIONAL_CONFIG_KEY = "twotower"
MODES = ("mask_diffusion", "verified", "ar", "auto")
AUTO_PASSES_PER_STEP = 8
"""The most denoiser passes of a step with ``denoise_steps_per_engine_step: auto``: new requests wait for them."""
MAX_STEPS = 1024
"""The largest ``diffusion_max_steps``: the posterior strategy looks at all steps of a block at once."""
FIRST_MODE = "twotower_first_mode"
"""The key in a request's ``extra_args`` by which the scheduler tells the worker how an ``auto`` request starts."""

Mode = Literal["mask_diffusion", "verified", "ar", "auto"]

_OF_DENOISER = {"confidence_threshold", "mask_token_id", "lossless", "draft_steps", "prompt_tokens_beside_blocks"}
_NO_DENOISER = "needs the denoiser; with additional_config['twotower'].towers='context' the only mode is 'ar'"

# What became of options of earlier versions.
_NO_COMMIT = (
    "was removed: the context tower reads a finished block in the step that starts the next one; for fewer of its "
    "passes set denoise_steps_per_engine_step to 2"
)
_NO_MOCK_AR = "was removed: compare towers with vllm_twotower.reference.generate_mock_ar"


class RequestError(ValueError):
    """An option that cannot be honoured: its name, its value, and why."""

    def __init__(self, name: str, value: Any, reason: str):
        super().__init__(f"{name}={value!r}: {reason}")
        self.name, self.value = name, value


# The checks of options: each returns the value, or raises RequestError with the option's name. What else they are told,
# the vocabulary's size or the engine's options, most do not need.


def _choice(name: str, value: Any, allowed: tuple[str, ...]) -> Any:
    if value not in allowed:
        raise RequestError(name, value, f"must be one of {', '.join(map(repr, allowed))}")
    return value


def _mode(name: str, value: Any, *_: Any) -> Any:
    if value == "mock_ar":
        raise RequestError(name, value, _NO_MOCK_AR)
    return _choice(name, value, MODES)


def _towers(name: str, value: Any, *_: Any) -> Any:
    return _choice(name, value, ("both", "context"))


def _integer(name: str, value: Any, low: int, high: int | None) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise RequestError(
            name, value, f"must be an integer {f'from {low} to {high}' if high else f'of at least {low}'}"
        )
    return value


def _steps_or_auto(name: str, value: Any, *_: Any) -> int | str:
    if value == "auto":
        return value
    try:
        return _integer(name, value, 1, None)
    except RequestError:
        raise RequestError(name, value, "must be 'auto' or an integer of at least 1") from None


def _flag(name: str, value: Any, *_: Any) -> bool:
    """A boolean, or the 0 or 1 that vLLM's server makes of one."""
    if value not in (0, 1) or not isinstance(value, int | float):
        raise RequestError(name, value, "must be true or false")
    return bool(value)


def _threshold(name: str, value: Any, *_: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) <= 1:
        raise RequestError(name, value, "must be a number greater than 0 and at most 1")
    return float(value)


def _strategy(name: str, value: Any, *_: Any) -> str:
    from vllm_twotower.sampling.strategies import strategies

    return _choice(name, value, tuple(strategies()))


def _noise_schedule(name: str, value: Any, *_: Any) -> str:
    from vllm_twotower.sampling.strategies import NOISE_SCHEDULES

    return _choice(name, value, tuple(NOISE_SCHEDULES))


def _remasking(name: str, value: Any, *_: Any) -> str:
    from vllm_twotower.sampling.strategies import REMASKING_SCORES

    return _choice(name, value, REMASKING_SCORES)


def _trace(name: str, value: Any, *_: Any) -> str:
    return _choice(name, value, LEVELS)


def _option(check: Callable[..., Any], of_strategy: bool = False, **options: Any) -> Any:
    """A field that users set: how it is checked, and whether it means something to some strategies alone."""
    return field(metadata={"check": check, "of_strategy": of_strategy}, **options)


@dataclass(frozen=True)
class EngineOptions:
    """What holds for every request of an engine.

    ``canvas_length`` (S) tokens are denoised at once; a request may ask for fewer. ``max_denoising_steps`` is the
    default of ``diffusion_max_steps``, the passes a block may take, not a bound.
    ``towers`` says which are loaded: without the denoiser there is one mode, ``ar``.
    ``mode`` is the default of ``diffusion_mode``; with ``auto`` the engine chooses between ``ar`` and
    ``mask_diffusion`` block by block, or, if it is to be ``lossless``, between ``ar`` and ``verified``. ``draft_steps``
    is the default of ``diffusion_draft_steps``, the passes that draft a block which is then verified.
    ``denoise_steps_per_engine_step`` bounds the passes of one engine step; ``auto`` goes on while no request waits for
    the step's end. Beside blocks, prompts may take as many tokens of a step as the blocks of all open requests would,
    and at least ``prompt_tokens_beside_blocks``.
    ``ablation`` takes something away from the denoiser, in developer mode (``experiments/ablation.py``).
    ``request_metrics`` is the level of ``--per-request-spec-decode-metrics``, ``seed`` that of ``--seed``, for requests
    without one of their own. With ``custom_arguments`` a request's ``extra_args`` may hold those of custom logits
    processors.
    """

    canvas_length: int = DEFAULT_CANVAS_LENGTH
    max_denoising_steps: int = DEFAULT_CANVAS_LENGTH
    confidence_threshold: float = _option(_threshold, default=0.8)
    mask_token_id: int = _option(
        lambda name, value, vocab_size: _integer(name, value, 0, vocab_size - 1), default=DEFAULT_MASK_TOKEN_ID
    )
    mode: Mode = _option(_mode, default="mask_diffusion")
    lossless: bool = _option(_flag, default=False)
    draft_steps: int = _option(lambda name, value, _: _integer(name, value, 1, MAX_STEPS), default=1)
    denoise_steps_per_engine_step: int | Literal["auto"] = _option(_steps_or_auto, default="auto")
    prompt_tokens_beside_blocks: int = _option(lambda name, value, _: _integer(name, value, 1, None), default=64)
    towers: Literal["both", "context"] = _option(_towers, default="both")
    ablation: Mapping[str, Any] | None = _option(lambda name, value, _: value, default=None)
    request_metrics: str = "none"
    custom_arguments: bool = False
    seed: int = 0

    @classmethod
    def resolve(
        cls,
        additional_config: Mapping[str, Any] | None,
        canvas_length: int,
        max_denoising_steps: int | None,
        vocab_size: int,
        **defaults: Any,
    ) -> EngineOptions:
        """Builds the options from vLLM's configuration; raises ValueError naming the option, its value, and the rule.

        ``canvas_length`` and ``max_denoising_steps`` are those of ``--diffusion-config``, ``defaults`` those of the
        checkpoint, the device and vLLM's own options, by field.
        """
        where = f"additional_config['{ADDITIONAL_CONFIG_KEY}']"
        given = (additional_config or {}).get(ADDITIONAL_CONFIG_KEY, {})
        if not isinstance(given, Mapping):
            raise ValueError(f"{where} must be a mapping of options, got {given!r}")
        checks = {option.name: option.metadata["check"] for option in fields(cls) if option.metadata}
        for name, value in given.items():
            if name == "commit":
                raise RequestError(f"{where}.{name}", value, _NO_COMMIT)
            if name not in checks:
                raise ValueError(f"unknown option {name!r} in {where}; known are {', '.join(checks)}")
            defaults[name] = checks[name](f"{where}.{name}", value, vocab_size)
        steps = canvas_length if max_denoising_steps is None else max_denoising_steps
        _integer("diffusion_config.max_denoising_steps", steps, 1, MAX_STEPS)
        _integer("diffusion_config.canvas_length", canvas_length, 1, MAX_STEPS)
        if defaults.get("towers") == "context":
            defaults.setdefault("mode", "ar")
            for name in given.keys() & _OF_DENOISER:
                raise RequestError(f"{where}.{name}", given[name], _NO_DENOISER)
        options = cls(canvas_length, steps, **defaults)
        options.check_mode(f"{where}.mode", options.mode)
        return options

    @property
    def context_alone(self) -> bool:
        """Whether there is no denoiser."""
        return self.towers == "context"

    def check_mode(self, name: str, mode: Mode) -> None:
        """Raises RequestError for the option ``name``, whose value is ``mode``, where that cannot work."""
        if self.context_alone and mode != "ar":
            raise RequestError(name, mode, _NO_DENOISER)
        if self.canvas_length == 1 and mode in _LONGER_BLOCKS:
            raise RequestError(name, mode, "is not supported with a canvas length of 1")

    @classmethod
    def of(cls, model_config: ModelConfig) -> EngineOptions:
        """The options that :meth:`store` left in a model configuration."""
        return cls(**model_config.hf_config.twotower)

    def store(self, model_config: ModelConfig) -> None:
        """Keeps the options where every process of the engine finds them."""
        model_config.hf_config.twotower = _StoredOptions(asdict(self))
        model_config.hf_config.canvas_length = self.canvas_length


class _StoredOptions(dict):
    """The options in a configuration. A process that such a configuration is sent to loads vLLM's plugins.

    vLLM loads them where a configuration is made; Ray Serve's replicas get theirs from another process.
    """

    def __reduce__(self) -> tuple:
        return _receive, (dict(self),)


def _receive(options: dict[str, Any]) -> _StoredOptions:
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    return _StoredOptions(options)


@dataclass(frozen=True)
class RequestOptions:
    """The TwoTower options of one request, complete and checked; ``diffusion_`` and a field's name is the option's."""

    mode: Mode = _option(_mode)
    confidence_threshold: float = _option(_threshold, of_strategy=True)
    max_steps: int = _option(lambda name, value, _: _integer(name, value, 1, MAX_STEPS))
    canvas_length: int = _option(
        lambda name, value, engine: _integer(name, value, 1 + (engine.mode in _LONGER_BLOCKS), engine.canvas_length)
    )
    strategy: str = _option(_strategy, default="confidence_unmasking")
    noise_schedule: str = _option(_noise_schedule, of_strategy=True, default="linear")
    adaptive_unmasking: bool = _option(_flag, of_strategy=True, default=False)
    remasking: str = _option(_remasking, of_strategy=True, default="confidence")
    lossless: bool = _option(_flag, default=False)
    draft_steps: int = _option(lambda name, value, _: _integer(name, value, 1, MAX_STEPS), default=1)
    trace: str = _option(_trace, default="none")

    @property
    def fills_blocks(self) -> bool:
        """Whether the denoiser may fill blocks for the request, which are returned as they are."""
        return self.mode == "mask_diffusion" or (self.mode == "auto" and not self.lossless)

    @property
    def verifies(self) -> bool:
        """Whether the denoiser may draft blocks for the request, of which it gets what mode ``ar`` would give it."""
        return self.mode == "verified" or (self.mode == "auto" and self.lossless)

    @property
    def passes_per_block(self) -> int:
        """The most denoiser passes over a block."""
        return self.draft_steps if self.verifies else self.max_steps

    @classmethod
    def of(cls, params: SamplingParams, engine: EngineOptions) -> RequestOptions:
        """The options of a request that was admitted; with a grammar ``auto`` and ``verified`` mean ``ar``."""
        given = {name: value for name, value in (params.extra_args or {}).items() if name != FIRST_MODE}
        options = cls.parse(given, engine)
        if options.mode != "ar" and params.structured_outputs is not None:
            return cls("ar", engine.confidence_threshold, 1, 1, trace=options.trace)
        return options

    @classmethod
    def parse(cls, extra_args: Mapping[str, Any] | None, engine: EngineOptions) -> RequestOptions:
        """Reads ``extra_args``; raises RequestError naming the option, its value, and what is allowed.

        No option is ignored: those of one mode are refused in another, and those of one strategy for another.
        """
        from vllm_twotower.sampling.strategies import strategies

        given = {
            name: value
            for name, value in (extra_args or {}).items()
            if value is not None and (name.startswith(_PREFIX) or not engine.custom_arguments)
        }
        options = {_PREFIX + option.name: option for option in fields(cls)}
        for name in sorted(given.keys() - options.keys()):
            raise RequestError(name, given[name], f"unknown option in extra_args; known are {', '.join(options)}")
        mode = _mode("diffusion_mode", given.pop("diffusion_mode", engine.mode))
        if mode == "ar":
            for name, value in given.items():
                if name != TRACE:
                    raise RequestError(name, value, f"has no meaning with diffusion_mode {mode!r}")
            return cls(mode, engine.confidence_threshold, 1, 1, trace=_trace(TRACE, given.get(TRACE, "none")))
        engine.check_mode("diffusion_mode", mode)
        engine = replace(engine, mode=mode)
        chosen = {
            options[name].name: options[name].metadata["check"](name, value, engine) for name, value in given.items()
        }
        result = cls(
            mode,
            engine.confidence_threshold,
            engine.max_denoising_steps,
            engine.canvas_length,
            lossless=engine.lossless and mode == "auto",
            draft_steps=engine.draft_steps,
        )
        result = replace(result, **chosen)
        result._check_meaning(given)
        of_strategy = strategies()[result.strategy].options
        for name, value in sorted(given.items()):
            if options[name].metadata["of_strategy"] and options[name].name not in of_strategy:
                raise RequestError(name, value, f"has no meaning with diffusion_strategy {result.strategy!r}")
        return result

    def _check_meaning(self, given: Mapping[str, Any]) -> None:
        """Raises RequestError for an option of another mode."""
        name, mode = "diffusion_lossless", f"diffusion_mode {self.mode!r}"
        if name in given and self.mode != "auto":
            raise RequestError(name, given[name], f"has no meaning with {mode}")
        if self.mode == "auto":
            mode += f" and {name} {str(self.lossless).lower()}"
        positions = self.canvas_length * self.passes_per_block
        if self.trace == "passes" and positions > MAX_CANVAS_POSITIONS:
            reason = (
                f"needs canvas length times passes of at most {MAX_CANVAS_POSITIONS}, here {positions}; use 'tokens'"
            )
            raise RequestError(TRACE, self.trace, reason)
        name, instead = (
            ("diffusion_max_steps", "; use diffusion_draft_steps") if self.verifies else ("diffusion_draft_steps", "")
        )
        if name in given:
            raise RequestError(name, given[name], f"has no meaning with {mode}{instead}")


_PREFIX = "diffusion_"
_LONGER_BLOCKS: tuple[str, ...] = ("auto", "verified")
"""The modes whose blocks have two tokens and more."""

_NO_GRAMMAR = "a grammar needs its tokens one after another; use diffusion_mode 'ar'"
_NO_MEANING = "is not supported for this model"

# Sampling parameters of vLLM that are refused: name, in which modes, whether it is set, and why.
_REFUSED: tuple[tuple[str, tuple[str, ...], Callable[[SamplingParams], bool], str], ...] = (
    ("structured_outputs", ("mask_diffusion",), lambda p: p.structured_outputs is not None, _NO_GRAMMAR),
    ("thinking_token_budget", MODES, lambda p: p.thinking_token_budget is not None, _NO_MEANING),
    ("trace_decode_token_ids", MODES, lambda p: p.trace_decode_token_ids is not None, _NO_MEANING),
)


def validate_sampling_params(params: SamplingParams, model_config: ModelConfig) -> None:
    """Checks a request before it is admitted, in place of vLLM's rules for diffusion models.

    Raises ``VLLMValidationError`` (HTTP 400 in the server) naming the parameter, its value and what is allowed.
    """
    from vllm.exceptions import VLLMValidationError

    engine = EngineOptions.of(model_config)
    try:
        options = RequestOptions.parse(params.extra_args, engine)
        for name, modes, is_set, reason in _REFUSED:
            if options.mode in modes and is_set(params):
                raise RequestError(name, getattr(params, name), reason)
        if model_config.skip_tokenizer_init:
            for name in ("stop", "bad_words"):
                if value := getattr(params, name):
                    raise RequestError(name, value, "needs a tokenizer, which skip_tokenizer_init leaves out")
        if options.fills_blocks and set(params.allowed_token_ids or ()) == {engine.mask_token_id}:
            raise RequestError("allowed_token_ids", params.allowed_token_ids, "the mask token alone fills no block")
        _check_encodable(params)
    except RequestError as error:
        raise VLLMValidationError(str(error), parameter=error.name, value=error.value) from None


def _check_encodable(params: SamplingParams) -> None:
    """Raises RequestError for a value that no message to the engine can hold; vLLM would fail while it sends it."""
    import msgspec
    from vllm.v1.serial_utils import MsgpackEncoder

    encode = MsgpackEncoder().encode
    reasons: dict[type[Exception], str] = {
        OverflowError: "has an integer beyond 64 bits",
        UnicodeEncodeError: "is no text in Unicode",
    }
    try:
        encode(params)
    except tuple(reasons):
        for option in msgspec.structs.fields(params):
            value = getattr(params, option.name)
            try:
                encode(value)
            except tuple(reasons) as error:
                raise RequestError(option.name, value, reasons[type(error)]) from None
        raise
