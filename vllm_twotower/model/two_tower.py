"""``NemotronHTwoTowerForCausalLM``: the architecture that vLLM loads for a TwoTower checkpoint."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateShapeCalculator
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid, MambaStateShapes
from vllm.model_executor.models.nemotron_h import NemotronHForCausalLM
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors

from vllm_twotower.architecture import TwoTowerConfig, is_of_context, tensor_shapes
from vllm_twotower.checkpoint import WeightCheck
from vllm_twotower.options import EngineOptions
from vllm_twotower.quantization import quantization_of

from .context import ContextMambaMixer, context_tower
from .denoiser import CONTEXT_PREFIX, DENOISER_PREFIX, CanvasRows, DenoiserTower
from .quantized_cpu import kept_tensors
from .shared_memory import remove_group_names
from .step_logits import OutputHead, StepLogits, logit_rows_per_tile
from .time_conditioning import TimeConditioning

if TYPE_CHECKING:
    from vllm_twotower.engine.pass_plan import PassPlan


class NemotronHTwoTowerForCausalLM(nn.Module, HasInnerState, IsHybrid):
    """Both towers, both heads and the time conditioning; or the context tower and its head alone.

    A pass runs the context tower over tokens it has not read, then the denoiser over canvases; which rows these are is
    the :class:`~vllm_twotower.engine.pass_plan.PassPlan` that the model state hands to ``forward``.
    """

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            name: f"time_conditioning.{name}" for name in ("t_embedder.", "t_block.", "scale_shift_tables.")
        },
        orig_to_new_substr={"A_log": "A", "embeddings": "embed_tokens"},
        orig_to_new_stacked={f".{part}_proj": (".qkv_proj", part) for part in "qkv"},
    )
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}

    get_mamba_state_dtype_from_config = NemotronHForCausalLM.get_mamba_state_dtype_from_config
    get_mamba_state_copy_func = NemotronHForCausalLM.get_mamba_state_copy_func

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> MambaStateShapes:
        """Shapes of one request's convolution and SSM state; a canvas needs no further ones."""
        config = vllm_config.model_config.hf_config
        return MambaStateShapeCalculator.mamba2_state_shape(
            intermediate_size=config.mamba_num_heads * config.mamba_head_dim,
            tp_world_size=vllm_config.parallel_config.tensor_parallel_size,
            n_groups=config.n_groups,
            num_heads=config.mamba_num_heads,
            head_dim=config.mamba_head_dim,
            state_size=config.ssm_state_size,
            conv_kernel=config.conv_kernel,
            num_spec=0,
        )

    @staticmethod
    def get_model_state_cls():
        """The class that plans the steps; asked for by vLLM's model runner once the weights are loaded."""
        from vllm_twotower.engine.model_state import TwoTowerModelState
        from vllm_twotower.patches import install_worker_patches

        install_worker_patches()
        return TwoTowerModelState

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        remove_group_names()
        gc.freeze()  # as vLLM does after the start; until then it collects among all that is imported, four times over
        config = vllm_config.model_config.hf_config
        self.config, quant_config = config, vllm_config.quant_config
        self.checkpoint_config = TwoTowerConfig.of(config)
        self.options = EngineOptions.of(vllm_config.model_config)
        self._quantization = quantization_of(getattr(config, "quantization_config", None))
        layout = tensor_shapes(self.checkpoint_config)
        self._layout = layout if self._quantization is None else self._quantization.stored_shapes(layout)
        self.logits_processor = LogitsProcessor(config.vocab_size)

        def lm_head(name: str) -> ParallelLMHead:
            name = maybe_prefix(prefix, name)
            return ParallelLMHead(config.vocab_size, config.hidden_size, quant_config=quant_config, prefix=name)

        self.context_tower = context_tower(vllm_config, maybe_prefix(prefix, CONTEXT_PREFIX))
        self.context_lm_head = lm_head("context_lm_head")
        self.context_head = OutputHead(self.context_lm_head, self.logits_processor)
        self.denoiser_head: OutputHead | None = None
        if self.options.context_alone:
            # With patterns of its own vLLM's loader does not ask for the denoiser's files, which the index may name.
            self.allow_patterns_overrides = ["*.safetensors"]
        else:
            make_tower: Callable[..., DenoiserTower] = DenoiserTower
            make_time: Callable[..., TimeConditioning] = TimeConditioning
            if self.options.ablation is not None:
                from vllm_twotower.experiments.ablation import ablated

                make_tower, make_time = ablated(self.options.ablation)
            self.denoiser_tower = make_tower(vllm_config, maybe_prefix(prefix, DENOISER_PREFIX))
            self.time_conditioning = make_time(config.hidden_size, len(config.hybrid_override_pattern))
            self.lm_head = lm_head("lm_head")
            self.denoiser_head = OutputHead(self.lm_head, self.logits_processor)
        self.logit_tile = logit_rows_per_tile(config.vocab_size, self.options.canvas_length)
        self._step_logits: StepLogits | None = None

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Embeddings (T, H) of the context tower."""
        return self.context_tower.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        plan: PassPlan | None = None,
    ) -> Tensor:
        """Runs the planned step and keeps the hidden states that need logits for :meth:`compute_logits`.

        Without a plan, memory is being profiled: both towers run over all of ``input_ids`` (T,). Returns hidden states
        (T, H) then, and where a prompt's log-probabilities are asked for, of which only that prompt's are set.
        Otherwise (T, 0), since the rows that vLLM's runner would pick are not the ones here.
        """
        if plan is None:
            return self._profile(input_ids, positions)
        self._step_logits, hidden = self._run(plan)
        if plan.context is None or plan.context.prompt_tokens is None:
            return positions.new_empty((len(positions), 0))
        assert hidden is not None
        here, in_batch = plan.context.prompt_tokens
        return hidden.new_zeros((len(positions), hidden.shape[1])).index_copy_(0, in_batch, hidden[here])

    def run(self, plan: PassPlan) -> StepLogits:
        """A further pass of the step, in a forward context of its own."""
        return self._run(plan)[0]

    def _run(self, plan: PassPlan) -> tuple[StepLogits, Tensor | None]:
        """What the pass has logits for, and all hidden states (T, H) of the context tower if it runs."""
        hidden, drafts, denoiser = (
            None if run is None else run.run(self) for run in (plan.context, plan.drafts, plan.canvas)
        )
        context = None
        if plan.context is not None and plan.context.logits_indices is not None:
            assert hidden is not None
            context = hidden[plan.context.logits_indices]
        return self._logits(context, drafts, denoiser), hidden

    def denoise(self, input_ids: Tensor, rows: CanvasRows, time: Tensor) -> Tensor:
        """One denoiser pass over canvas tokens (T,) at times (R,), in a forward context: hidden states (T, H)."""
        conditioning = self.time_conditioning
        return self.denoiser_tower(input_ids, rows, conditioning(time), conditioning.scale_shift_tables)

    def _logits(self, context: Tensor | None, drafts: Tensor | None, denoiser: Tensor | None) -> StepLogits:
        return StepLogits(context, drafts, denoiser, self.context_head, self.denoiser_head, self.logit_tile)

    def _profile(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        get_forward_context().is_padding = None
        hidden, kept = self.context_tower(input_ids, positions), []
        if not self.options.context_alone:
            width = self.options.canvas_length
            rows = CanvasRows(-(-len(input_ids) // width), width)
            mixers = [module for module in self.context_tower.modules() if isinstance(module, ContextMambaMixer)]
            kept = [mixer.blank_read(rows.num_rows, width) for mixer in mixers]
            canvases = F.pad(input_ids, (0, rows.num_rows * width - len(input_ids)))
            hidden = self.denoise(canvases, rows, torch.ones(rows.num_rows, device=input_ids.device))[: len(input_ids)]
        self._step_logits = replace(self._logits(hidden, None, None), kept=kept)
        return hidden

    def compute_logits(self, hidden_states: Tensor) -> StepLogits | Tensor:
        """The hidden states that ``forward`` kept for the sampler, with their heads.

        Called again in the same step, for a prompt's log-probabilities: the context head's logits (n, V) of its hidden
        states (n, H).
        """
        kept, self._step_logits = self._step_logits, None
        return self.context_head(hidden_states) if kept is None else kept

    def is_unused_checkpoint_weight(self, name: str) -> bool:
        """Whether a tensor is the denoiser's, and there is none: vLLM's loader leaves out files of such tensors."""
        return self.options.context_alone and name in self._layout and not is_of_context(name)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Loads a checkpoint in the official key layout.

        The context tower alone leaves out what is the denoiser's.
        Raises :class:`~vllm_twotower.architecture.CheckpointError` naming a missing, unexpected or wrongly shaped
        tensor.
        """
        quantization = self._quantization
        check = WeightCheck(self.checkpoint_config, quantization, self.options.context_alone)
        tensors = check.seen((name, tensor) for name, tensor in weights if not self.is_unused_checkpoint_weight(name))
        if quantization is not None and current_platform.is_cpu():
            kept = partial(kept_tensors, quantization)
            tensors = quantization.plain_tensors(tensors, tensor_shapes(self.checkpoint_config), kept)
        loaded = AutoWeightsLoader(self).load_weights(tensors, mapper=self.hf_to_vllm_mapper)
        check.finish()
        return loaded
