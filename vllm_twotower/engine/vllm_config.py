"""What vLLM's configuration must be for a TwoTower engine: checked, completed, or refused in words."""

from __future__ import annotations

import functools
import os
import signal
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

import vllm.envs as envs
from vllm.config import DiffusionConfig
from vllm.config.compilation import CompilationMode, CUDAGraphMode
from vllm.logger import init_logger
from vllm.model_executor.models.config import NemotronHForCausalLMConfig, VerifyAndUpdateConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.gpu.sample.logits_processor.loader import LOGITSPROCS_GROUP

from vllm_twotower.checkpoint import DEFAULT_CANVAS_LENGTH, TwoTowerConfig
from vllm_twotower.config import EngineOptions
from vllm_twotower.parallel import check_tensor_parallel_size
from vllm_twotower.ray_devices import check_ray_devices

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.config import ModelConfig, VllmConfig

logger = init_logger(__name__)

SCHEDULER_CLS = "vllm_twotower.engine.scheduler.TwoTowerScheduler"


class TwoTowerModelConfig(VerifyAndUpdateConfig):
    """The hooks that vLLM calls for this architecture while it builds its configuration."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Declares the model a diffusion model: vLLM asks ``hf_config.canvas_length``."""
        hf_config = model_config.hf_config
        if getattr(hf_config, "canvas_length", None) is None:
            hf_config.canvas_length = DEFAULT_CANVAS_LENGTH
        if not _has_experts(hf_config) and getattr(hf_config, "n_routed_experts", 0):
            # vLLM takes a model for one with experts by this number, and would run its replicas in step.
            hf_config.n_routed_experts = 0
            model_config.model_arch_config = model_config.get_model_arch_config()

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Resolves the engine's options; raises ValueError for what cannot be served, naming option and value."""
        _keep_signals_of_forked_processes()
        _refuse_unsupported(vllm_config)
        NemotronHForCausalLMConfig.verify_and_update_config(vllm_config)

        hf_config = vllm_config.model_config.hf_config
        if vllm_config.diffusion_config is None:
            vllm_config.diffusion_config = DiffusionConfig(canvas_length=hf_config.canvas_length)
        diffusion = vllm_config.diffusion_config
        if diffusion.canvas_length is None:
            diffusion.canvas_length = hf_config.canvas_length
        options = EngineOptions.resolve(
            vllm_config.additional_config,
            canvas_length=diffusion.canvas_length,
            max_denoising_steps=diffusion.max_denoising_steps,
            mask_token_id=getattr(hf_config, "mask_token_id", None),
            vocab_size=vllm_config.model_config.get_vocab_size(),
            request_metrics=vllm_config.observability_config.per_request_spec_decode_metrics,
            # A GPU's pass reads all weights for a few tokens already; a CPU's takes longer with every token.
            prompt_tokens_beside_blocks=64 if current_platform.is_cpu() else 1024,
            custom_arguments=bool(vllm_config.model_config.logits_processors or entry_points(group=LOGITSPROCS_GROUP)),
        )
        options.store(vllm_config.model_config)
        _check_ranks(vllm_config)
        # Later vLLM refuses this without a speculative configuration; our scheduler takes the level from the options.
        vllm_config.observability_config.per_request_spec_decode_metrics = "none"
        _refuse_transfers(vllm_config)
        _choose_scheduler(vllm_config)
        _choose_worker(vllm_config)
        _fit_scheduler(vllm_config, options)
        # The two towers run on different rows of a step, so a whole-step graph or compiled forward does not apply.
        vllm_config.compilation_config.mode = CompilationMode.NONE
        vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE


@functools.cache
def _keep_signals_of_forked_processes() -> None:
    """A forked process must not pass its signals on to the event loop of the process it was forked from.

    It inherits the file descriptor to which Python writes them: a SIGTERM for a rank would shut the server down.
    """
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))


def _refuse_unsupported(vllm_config: VllmConfig) -> None:
    parallel = vllm_config.parallel_config
    refused = (
        (
            "attention_config.backend",
            vllm_config.attention_config.backend == AttentionBackendEnum.FLASHINFER and "FLASHINFER",
            "FlashInfer drops the denoiser's keys and values; use FLASH_ATTN or TRITON_ATTN",
        ),
        (
            "pipeline_parallel_size",
            parallel.pipeline_parallel_size > 1 and parallel.pipeline_parallel_size,
            "both towers' layers must be in one process; use tensor parallelism",
        ),
        (
            "decode_context_parallel_size",
            parallel.decode_context_parallel_size > 1 and parallel.decode_context_parallel_size,
            "the denoiser reads whole sequences of keys and values",
        ),
        (
            "prefill_context_parallel_size",
            parallel.prefill_context_parallel_size > 1 and parallel.prefill_context_parallel_size,
            "the Mamba layers read the prompt in order",
        ),
        ("enable_dbo", parallel.enable_dbo, "the two towers cannot be split into microbatches"),
        ("enable_lora", vllm_config.lora_config is not None, "LoRA adapters are not supported"),
        (
            "bidirectional_mamba",
            getattr(vllm_config.model_config.hf_config, "bidirectional_mamba", False),
            "the denoiser's Mamba layers run from left to right here; use vllm_twotower.reference",
        ),
        (
            "speculative_config",
            vllm_config.speculative_config is not None and vllm_config.speculative_config.method,
            "blocks are denoised in the place of draft tokens",
        ),
        (
            "async_scheduling",
            vllm_config.scheduler_config.async_scheduling,
            "which rows the context tower runs on depends on the step before",
        ),
        (
            "VLLM_RAISE_ON_LOGIT_NANS",
            envs.VLLM_RAISE_ON_LOGIT_NANS,
            "vLLM's count of NaN logits carries the denoiser's passes to the scheduler",
        ),
        (
            "prefix_match_unit",
            vllm_config.cache_config.prefix_match_unit,
            "Mamba states are cached at the end of whole pages; leave it out",
        ),
        ("mamba_use_replayssm", vllm_config.cache_config.use_replayssm, "the denoiser reads materialised Mamba states"),
    )
    for name, value, reason in refused:
        if value:
            raise ValueError(f"{name}={value!r} is not supported for TwoTower models: {reason}")
    vllm_config.scheduler_config.async_scheduling = False
    if not vllm_config.use_v2_model_runner:
        raise ValueError("VLLM_USE_V2_MODEL_RUNNER=0 is not supported for TwoTower models: unset it")


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
    if parallel.use_ray and parallel.placement_group is None:
        check_ray_devices(parallel.world_size)


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

    try:
        chosen = config.get_scheduler_cls()
    except (ImportError, AttributeError, ValueError) as error:
        chosen, cause = None, error
    else:
        cause = None
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
    """A canvas is denoised whole or not at all: what would cut one is raised, with a warning."""
    scheduler = vllm_config.scheduler_config
    whole_step = options.canvas_length * scheduler.max_num_seqs
    limits = (
        ("max_num_batched_tokens", whole_step),
        ("max_num_scheduled_tokens", whole_step),
        ("long_prefill_token_threshold", options.canvas_length),
    )
    for name, needed in limits:
        if (value := getattr(scheduler, name)) and value < needed:
            logger.warning(
                "%s=%d would cut the canvases (%d tokens each) of %d running requests; raised to %d",
                name,
                value,
                options.canvas_length,
                scheduler.max_num_seqs,
                needed,
            )
            setattr(scheduler, name, needed)
