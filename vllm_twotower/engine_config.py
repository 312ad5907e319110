"""What vLLM's configuration must be for a TwoTower engine: checked, completed, or refused in words."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

import torch
import vllm.envs as envs
from vllm.config import DiffusionConfig
from vllm.config.compilation import CompilationMode, CUDAGraphMode
from vllm.logger import init_logger
from vllm.model_executor.models.config import NemotronHForCausalLMConfig, VerifyAndUpdateConfig
from vllm.platforms import current_platform
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

from vllm_twotower.architecture import DEFAULT_CANVAS_LENGTH, DEFAULT_MASK_TOKEN_ID, TwoTowerConfig
from vllm_twotower.checkpoint import lacks_denoiser
from vllm_twotower.engine.processes import keep_signals_of_forked_processes
from vllm_twotower.options import ATTENTION_BACKENDS, ATTENTION_REASON, EngineOptions
from vllm_twotower.parallel import check_tensor_parallel_size
from vllm_twotower.ray_devices import check_ray_devices

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.config import ModelConfig, VllmConfig

logger = init_logger(f"vllm.{__name__}")  # vLLM shows what is logged below its own name

_TRITON_FP32, _RAY_COPIES = "TRITON_F32_DEFAULT", "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"
SCHEDULER_CLS = "vllm_twotower.engine.scheduler.TwoTowerScheduler"
CAPTURED_ROWS = (*range(1, 9), 12, *range(16, 65, 8))
"""For so many rows passes are captured as CUDA graphs; fewer are filled up."""
Limit = tuple[str, Any, Any, str]
"""An option that cannot always be honoured: its name, its value, whether it is refused (its truth), and why."""


class TwoTowerModelConfig(VerifyAndUpdateConfig):
    """The hooks that vLLM calls for this architecture while it builds its configuration."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Declares the model a diffusion model: vLLM asks ``hf_config.canvas_length``."""
        hf_config = model_config.hf_config
        if getattr(hf_config, "canvas_length", None) is None:
            hf_config.canvas_length = DEFAULT_CANVAS_LENGTH
        if getattr(hf_config, "n_routed_experts", 0) and not _has_experts(hf_config):
            # vLLM takes a model for one with experts by this number, and would run its replicas in step.
            hf_config.n_routed_experts = 0
            model_config.model_arch_config = model_config.get_model_arch_config()

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Resolves the engine's options; raises ValueError for what cannot be served, naming option and value."""
        keep_signals_of_forked_processes()
        _refuse_unsupported(vllm_config)
        NemotronHForCausalLMConfig.verify_and_update_config(vllm_config)

        hf_config = vllm_config.model_config.hf_config
        vllm_config.diffusion_config = diffusion = vllm_config.diffusion_config or DiffusionConfig()
        if diffusion.canvas_length is None:
            diffusion.canvas_length = hf_config.canvas_length
        hf_mask_token = getattr(hf_config, "mask_token_id", None)
        defaults = {
            # A GPU's pass reads all weights for a few tokens already; a CPU's takes longer with every token.
            "prompt_tokens_beside_blocks": 64 if current_platform.is_cpu() else 1024,
            # Of a checkpoint that is yet to be downloaded only the configuration is known.
            "towers": "context" if lacks_denoiser(vllm_config.model_config.model) else "both",
            "mask_token_id": DEFAULT_MASK_TOKEN_ID if hf_mask_token is None else hf_mask_token,
            "request_metrics": vllm_config.observability_config.per_request_spec_decode_metrics,
            "custom_arguments": _has_logits_processors(vllm_config.model_config),
            "seed": vllm_config.model_config.seed,
        }
        options = EngineOptions.resolve(
            vllm_config.additional_config,
            diffusion.canvas_length,
            diffusion.max_denoising_steps,
            vllm_config.model_config.get_vocab_size(),
            **defaults,
        )
        if options.ablation is not None:
            from vllm_twotower.experiments.ablation import check

            check(options, vllm_config)
        options.store(vllm_config.model_config)
        if options.context_alone:
            logger.info("The context tower is served alone, without the denoiser: its only mode is 'ar'.")
        _check_ranks(vllm_config)
        # Later vLLM refuses this without a speculative configuration; our scheduler takes the level from the options.
        vllm_config.observability_config.per_request_spec_decode_metrics = "none"
        _refuse_transfers(vllm_config)
        _choose_scheduler(vllm_config)
        _choose_worker(vllm_config)
        _fit_scheduler(vllm_config, options)
        # Where the device prefers FlashInfer for causal models, as sm_100 does.
        vllm_config.attention_config.use_non_causal = True
        if current_platform.is_cuda() and vllm_config.model_config.dtype == torch.float32:
            _multiply_in_fp32()
        vllm_config.compilation_config.mode = CompilationMode.NONE
        _fit_graphs(vllm_config)


def _refuse_unsupported(vllm_config: VllmConfig) -> None:
    for name, value, is_refused, reason in _limits(vllm_config):
        if is_refused:
            raise ValueError(f"{name}={value!r} is not supported for TwoTower models: {reason}")
    vllm_config.scheduler_config.async_scheduling = False
    if not vllm_config.use_v2_model_runner:
        raise ValueError("TwoTower models need vLLM's V2 model runner; the warning above says what it lacks")


def _limits(vllm_config: VllmConfig) -> Iterator[Limit]:
    yield from _model_limits(vllm_config)
    yield from _cache_limits(vllm_config)
    yield from _parallel_limits(vllm_config)
    yield from _step_limits(vllm_config)


def _model_limits(vllm_config: VllmConfig) -> Iterator[Limit]:
    model = vllm_config.model_config
    reason = "they only generate text"
    yield "convert", model.convert, model.convert not in ("auto", "none"), reason
    yield "runner", model.runner_type, model.runner_type != "generate", reason
    yield "pooler_config", model.pooler_config, model.pooler_config, reason
    yield "enable_lora", True, vllm_config.lora_config, "LoRA adapters are not supported"
    yield "enable_prompt_embeds", True, model.enable_prompt_embeds, "both towers read token ids"
    yield "enable_trace_replay", True, model.enable_trace_replay, "blocks are not replayed"
    if (encoder := vllm_config.ec_transfer_config) is not None:
        yield "ec_transfer_config.ec_connector", encoder.ec_connector, True, "there is no encoder"
    if (transfer := vllm_config.weight_transfer_config) is not None:
        yield "weight_transfer_config.backend", transfer.backend, True, "weights are read once, at startup"
    if (watermark := vllm_config.watermark_config) is not None:
        yield "watermark_config.algorithm", watermark.algorithm, True, "blocks are sampled without watermarks"
    if (speculative := vllm_config.speculative_config) is not None:
        reason = "blocks are denoised in the place of draft tokens"
        yield "speculative_config", speculative.method, True, reason
    bidirectional = getattr(model.hf_config, "bidirectional_mamba", False)
    reason = "the denoiser's Mamba layers run from left to right here; use vllm_twotower.reference"
    yield "bidirectional_mamba", bidirectional, bidirectional, reason
    reason = "on CPUs weights are as the checkpoint has them; `vllm-twotower quantize` makes one"
    of_checkpoint = getattr(model.hf_config, "quantization_config", None) and model.quantization
    for name in ("quantization", "quantization_config"):
        value = getattr(model, name)
        yield name, value, value and value != of_checkpoint and current_platform.is_cpu(), reason
    reason = "a token passes the experts of both towers, and the denoiser's many times"
    yield "enable_return_routed_experts", True, vllm_config.aux_output_config.enable_return_routed_experts, reason


def _cache_limits(vllm_config: VllmConfig) -> Iterator[Limit]:
    from vllm_twotower.quantization import quantization_of

    model, cache, attention = vllm_config.model_config, vllm_config.cache_config, vllm_config.attention_config
    backends = {"backend": attention.backend} if attention.backend else {}
    backends |= {f"backend_per_kind[{kind!r}]": backend for kind, backend in attention.backend_per_kind.items()}
    for name, backend in backends.items():
        is_unknown = backend.name not in ATTENTION_BACKENDS
        yield f"attention_config.{name}", backend.name, is_unknown, ATTENTION_REASON
    is_other = kv_cache_dtype_str_to_dtype(cache.cache_dtype, model) != model.dtype
    reason = f"keys and values are kept in the model's dtype, {model.dtype}; leave it out"
    quantization = quantization_of(getattr(model.hf_config, "quantization_config", None))
    if quantization is not None and (scheme := quantization.cache_scheme) is not None:
        is_other |= cache.cache_dtype == "auto"  # vLLM takes the checkpoint's when it makes the layers
        dtype = str(model.dtype).removeprefix("torch.")
        reason = f"the checkpoint asks for {scheme} keys and values, they are kept in the model's dtype: give {dtype!r}"
    yield "kv_cache_dtype", cache.cache_dtype, is_other, reason
    reason = "the context tower reads the whole prompt in every layer"
    yield "kv_sharing_fast_prefill", True, cache.kv_sharing_fast_prefill, reason
    reason = "Mamba states are cached at the end of whole pages; leave it out"
    yield "prefix_match_unit", cache.prefix_match_unit, cache.prefix_match_unit, reason
    yield "enable_mamba_shared_prefix_checkpoint", True, cache.enable_mamba_shared_prefix_checkpoint, reason
    yield "use_replayssm", True, cache.use_replayssm, "the denoiser reads materialised Mamba states"
    reason = "a request's tokens would depend on those beside it"
    rounds = vllm_config.mamba_config.enable_stochastic_rounding
    yield "enable_mamba_cache_stochastic_rounding", True, rounds, reason
    reason = "pages of attention layers and Mamba states differ in kind; leave it out"
    is_off = vllm_config.scheduler_config.disable_hybrid_kv_cache_manager
    yield "disable_hybrid_kv_cache_manager", True, is_off, reason


def _parallel_limits(vllm_config: VllmConfig) -> Iterator[Limit]:
    parallel = vllm_config.parallel_config
    sizes = {
        "pipeline_parallel_size": "both towers' layers must be in one process; use tensor parallelism",
        "decode_context_parallel_size": "the denoiser reads whole sequences of keys and values",
        "prefill_context_parallel_size": "the Mamba layers read the prompt in order",
        "ubatch_size": "the two towers cannot be split into microbatches",
    }
    for name, reason in sizes.items():
        size = getattr(parallel, name)
        yield name, size, size > 1, reason
    yield "enable_dbo", True, parallel.enable_dbo, "the two towers cannot be split into microbatches"
    reason = "every rank samples all blocks"
    yield "enable_batch_sharded_sampling", True, parallel.enable_batch_sharded_sampling, reason
    group = vllm_config.offload_config.prefetch.offload_group_size
    yield "offload_group_size", group, group, "the towers take turns, so the layer that runs next is not known"


def _step_limits(vllm_config: VllmConfig) -> Iterator[Limit]:
    scheduler, compilation = vllm_config.scheduler_config, vllm_config.compilation_config
    reason = "which rows the context tower runs on depends on the step before"
    yield "async_scheduling", True, scheduler.async_scheduling, reason
    reason = "beside blocks, prompts are read in chunks"
    yield "enable_chunked_prefill", False, not scheduler.enable_chunked_prefill, reason
    mode, graphs = compilation.mode or CompilationMode.NONE, compilation.cudagraph_mode or CUDAGraphMode.NONE
    reason = "the two towers run on different rows of a step; leave it out"
    yield "compilation_config.mode", mode.name, mode != CompilationMode.NONE, reason
    if current_platform.is_cpu():
        reason = "CPUs have no CUDA graphs; leave it out"
        allowed: tuple[CUDAGraphMode, ...] = (CUDAGraphMode.NONE,)
    else:
        reason = "passes are captured one by one: FULL_DECODE_ONLY, the default, or NONE"
        allowed = (CUDAGraphMode.NONE, CUDAGraphMode.FULL_DECODE_ONLY)
    yield "compilation_config.cudagraph_mode", graphs.name, graphs not in allowed, reason
    for name in ("cudagraph_capture_sizes", "max_cudagraph_capture_size"):
        value = getattr(compilation, name)
        yield name, value, value and current_platform.is_cpu(), reason

    reason = "vLLM's formulas know no denoiser; /metrics counts its passes"
    yield "enable_mfu_metrics", True, vllm_config.observability_config.enable_mfu_metrics, reason
    monokernel = getattr(vllm_config.kernel_config, "monokernel", False)  # since vLLM 0.33
    yield "monokernel", monokernel, monokernel, "it replaces layers of another model"
    yield "VLLM_USE_V2_MODEL_RUNNER", 0, envs.VLLM_USE_V2_MODEL_RUNNER is False, "unset it"
    reason = "vLLM's count of NaN logits carries the denoiser's passes to the scheduler"
    yield "VLLM_RAISE_ON_LOGIT_NANS", True, envs.VLLM_RAISE_ON_LOGIT_NANS, reason


def _fit_graphs(vllm_config: VllmConfig) -> None:
    """Chooses for how many rows passes are captured, on GPUs; vLLM's sizes are the tokens of so many canvases.

    Raises ValueError for capture sizes that are no whole canvases.
    """
    compilation, canvas = vllm_config.compilation_config, vllm_config.diffusion_config.canvas_length
    if not current_platform.support_static_graph_mode() or compilation.cudagraph_mode == CUDAGraphMode.NONE:
        compilation.cudagraph_mode = CUDAGraphMode.NONE
        return
    compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
    most_rows, sizes = vllm_config.scheduler_config.max_num_seqs, compilation.cudagraph_capture_sizes
    if sizes:
        if wrong := [size for size in sizes if size <= 0 or size % canvas]:
            raise ValueError(
                f"cudagraph_capture_sizes={sizes} is not supported for TwoTower models: passes over whole canvases are "
                f"captured, and {wrong} are no multiples of canvas_length={canvas}"
            )
        rows = {size // canvas for size in sizes}
    else:
        largest = compilation.max_cudagraph_capture_size or canvas * CAPTURED_ROWS[-1]
        if largest < canvas:
            raise ValueError(
                f"max_cudagraph_capture_size={largest} is not supported for TwoTower models: passes over whole canvases"
                f" are captured, so it must be canvas_length={canvas} at least; enforce_eager=True captures none"
            )
        rows = {*CAPTURED_ROWS, most_rows} & set(range(largest // canvas + 1))
    compilation.cudagraph_capture_sizes = sorted({canvas * min(count, most_rows) for count in rows})
    compilation.max_cudagraph_capture_size = compilation.cudagraph_capture_sizes[-1]


def _multiply_in_fp32() -> None:
    """Triton's products of fp32 in fp32, not in TF32, its default; Ray's workers get vLLM's own variables only."""
    os.environ.setdefault(_TRITON_FP32, "ieee")
    copied = os.environ.get(_RAY_COPIES, "")
    if _TRITON_FP32 not in copied.split(","):
        os.environ[_RAY_COPIES] = f"{copied},{_TRITON_FP32}".strip(",")


def _has_logits_processors(model_config: ModelConfig) -> bool:
    from vllm.v1.sample.logits_processor import LOGITSPROCS_GROUP

    return bool(model_config.logits_processors or entry_points(group=LOGITSPROCS_GROUP))


def _has_experts(hf_config: PretrainedConfig) -> bool:
    return "E" in hf_config.hybrid_override_pattern


def _check_ranks(vllm_config: VllmConfig) -> None:
    """Raises ValueError if the model cannot be divided over the ranks, or Ray has too few devices for them."""
    parallel, hf_config = vllm_config.parallel_config, vllm_config.model_config.hf_config
    has_experts = _has_experts(hf_config)
    if has_experts and parallel.enable_expert_parallel:
        raise ValueError(
            "enable_expert_parallel=True is not supported for TwoTower models: experts are divided by width, so that "
            "all ranks have the same work"
        )
    if has_experts and parallel.data_parallel_size > 1:
        raise ValueError(
            f"data_parallel_size={parallel.data_parallel_size} is not supported for TwoTower models with experts: "
            "these would have to run equally often in all replicas, which denoise as often as their own blocks need; "
            "start independent servers"
        )
    try:
        check_tensor_parallel_size(TwoTowerConfig.of(hf_config), parallel.tensor_parallel_size)
    except ValueError as error:
        raise ValueError(f"tensor_parallel_size={parallel.tensor_parallel_size} is not possible: {error}") from None
    if parallel.use_ray:
        check_ray_devices(parallel.world_size, parallel.placement_group)


def _refuse_transfers(vllm_config: VllmConfig) -> None:
    """After vLLM's own hooks: offloading is turned into a connector later."""
    reason = "pages and Mamba states are cached in the device's memory only"
    offloading_size = vllm_config.cache_config.kv_offloading_size
    if offloading_size is not None:
        raise ValueError(f"kv_offloading_size={offloading_size!r} is not supported for TwoTower models: {reason}")
    if vllm_config.kv_transfer_config is not None:
        connector = vllm_config.kv_transfer_config.kv_connector
        raise ValueError(
            f"kv_transfer_config.kv_connector={connector!r} is not supported for TwoTower models: {reason}"
        )


def _choose_scheduler(vllm_config: VllmConfig) -> None:
    """The package's scheduler, unless the user has chosen one that is built on it."""
    config = vllm_config.scheduler_config
    if config.scheduler_cls is None:
        config.scheduler_cls = SCHEDULER_CLS
        return
    from vllm_twotower.engine.scheduler import TwoTowerScheduler

    chosen, cause = None, None
    try:
        chosen = config.get_scheduler_cls()
    except (ImportError, AttributeError, ValueError) as error:
        cause = error
    if not (isinstance(chosen, type) and issubclass(chosen, TwoTowerScheduler)):
        raise ValueError(
            f"scheduler_cls={config.scheduler_cls!r} is not supported for TwoTower models: it must be {SCHEDULER_CLS} "
            "or a subclass of it"
        ) from cause


def _choose_worker(vllm_config: VllmConfig) -> None:
    """Ranks whose errors are noticed, unless the user or an unknown platform chooses otherwise."""
    parallel = vllm_config.parallel_config
    is_known = current_platform.is_cpu() or current_platform.is_cuda_alike()
    if parallel.tensor_parallel_size > 1 and parallel.worker_cls == "auto" and is_known:
        parallel.worker_cls = "vllm_twotower.engine.worker.RankWorker"


def _fit_scheduler(vllm_config: VllmConfig, options: EngineOptions) -> None:
    """A canvas is denoised whole or not at all, and vLLM starts with prompts of a canvas and one token to warm up.

    What would cut one is raised, with a warning.
    """
    scheduler, width = vllm_config.scheduler_config, 1 if options.context_alone else options.canvas_length
    whole_step = width * scheduler.max_num_seqs
    limits = (
        ("max_num_batched_tokens", max(whole_step, options.canvas_length + 1)),
        ("max_num_scheduled_tokens", whole_step),
        ("long_prefill_token_threshold", width),
    )
    for name, needed in limits:
        if (value := getattr(scheduler, name)) and value < needed:
            message = "%s=%d would cut canvases, or the prompts of vLLM's warm-up; raised to %d"
            logger.warning(message, name, value, needed)
            setattr(scheduler, name, needed)
