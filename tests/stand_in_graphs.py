"""CUDA graphs without CUDA: what vLLM captures is recorded, and replayed call by call on the same memory.

vLLM's own code captures, dispatches, profiles memory and forgets; only what it asks ``torch.cuda`` for is replaced.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import runner
from replay import Recording, tensors_in
from torch import Tensor
from torch_layers import torch_layers
from vllm import LLM
from vllm._custom_ops import CPUDNNLGEMMHandler
from vllm.config.compilation import CUDAGraphMode
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder
from vllm.v1.worker.gpu import cudagraph_utils, model_runner

from vllm_twotower.engine.pass_graphs import PassGraphs
from vllm_twotower.kernels import seeded_mamba
from vllm_twotower.model import time_conditioning


class StandInGraph:
    """In the place of ``torch.cuda.CUDAGraph``."""

    known: Callable[[], list[Tensor]]
    """The memory that graphs may read and write."""
    NUM_BYTES = 2 << 20
    """What a capture takes, to vLLM's eyes."""
    alive: list[StandInGraph] = []

    def __init__(self):
        self.recording = Recording(type(self).known())
        self.alive.append(self)

    def replay(self) -> None:
        """Replays, after all other graphs have left something else in the memory that they share."""
        for other in self.alive:
            other.recording.spoil()
        self.recording.replay()


class StandInCuda:
    """vLLM's runner of a CPU engine, made to capture graphs of its passes for rows of some numbers."""

    def __init__(self, llm: LLM, row_counts: tuple[int, ...]):
        self.runner, self.entered = runner(llm), 0
        self.state = self.runner.model_state
        self.layers = self.runner.compilation_config.static_forward_context
        canvas = self.state.options.canvas_length
        for head in filter(None, (self.state.model.context_head, self.state.model.denoiser_head)):
            head.chooses = True  # as on GPUs
        compilation = self.runner.compilation_config
        compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
        compilation.cudagraph_capture_sizes = [canvas * count for count in row_counts]
        compilation.max_cudagraph_capture_size = canvas * row_counts[-1]

    def known(self) -> list[Tensor]:
        """All memory that outlives a pass."""
        worker, model, cpu = self.runner, self.state.model, torch.device("cpu")
        table, planner = self.state.table, self.state.planner
        return [
            *(cache for layer in self.layers.values() for cache in tensors_in(layer.kv_cache)),
            *model.parameters(),
            *(tensor for module in model.modules() for tensor in tensors_in(list(vars(module).values()))),
            *model.buffers(),
            *vars(table.options).values(),
            table.canvas,
            table.step,
            table.is_draft,
            planner._buffers._host,
            worker.cudagraph_manager._outcomes,
            worker.req_states.all_token_ids.gpu,
            *worker.block_tables.input_block_tables,
            # Constants that are made once in a process.
            *(linear.handler_tensor for linear in gc.get_objects() if type(linear) is CPUDNNLGEMMHandler),
            seeded_mamba._no_later(self.state.options.canvas_length, cpu),
            time_conditioning._cached_frequencies(cpu),
        ]

    def make_graphs(self) -> PassGraphs:
        """The runner's graphs, as it makes them when it has a KV cache."""
        config = self.runner.vllm_config
        self.runner.cudagraph_manager = model_runner.ModelCudaGraphManager(
            config, torch.device("cpu"), CUDAGraphMode.FULL_DECODE_ONLY, config.diffusion_config.canvas_length
        )
        return self.runner.cudagraph_manager

    def capture(self) -> PassGraphs:
        """Captures as vLLM's worker does then."""
        graphs = self.make_graphs()
        with torch_layers(self.layers, self.state.planner.state_block_size):
            self.runner.capture_model()
        return graphs

    @contextmanager
    def graph_capture(self, device: torch.device) -> Iterator[None]:
        """vLLM's, in which communication between ranks can be captured."""
        self.entered += 1
        yield


@contextmanager
def stand_in_cuda(llm: LLM, row_counts: tuple[int, ...]) -> Iterator[StandInCuda]:
    """CUDA graphs for an engine on a CPU, as long as the block runs."""
    cuda, free = StandInCuda(llm, row_counts), [1 << 40]

    @contextmanager
    def graph(graph: StandInGraph, pool: Any, stream: Any) -> Iterator[None]:
        with graph.recording.records():
            yield
        free[0] -= StandInGraph.NUM_BYTES

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StandInGraph, "alive", [])
        patch.setattr(StandInGraph, "known", staticmethod(cuda.known), raising=False)
        patch.setattr(CPUAttentionMetadataBuilder, "_cudagraph_support", AttentionCGSupport.UNIFORM_BATCH)
        patch.setattr(torch.cuda, "CUDAGraph", StandInGraph)
        patch.setattr(torch.cuda, "graph", graph)
        patch.setattr(cudagraph_utils, "graph_capture", cuda.graph_capture)
        patch.setattr(cudagraph_utils, "capture_pool", lambda pool, config: nullcontext(pool))
        patch.setattr(cudagraph_utils, "current_stream", lambda: None)
        patch.setattr(model_runner, "lock_workspace", lambda: None)
        patch.setattr(type(current_platform), "graph_pool_handle", lambda self: object(), raising=False)
        patch.setattr(type(current_platform), "_global_graph_pool", None)
        memory = SimpleNamespace(
            synchronize=lambda: None, empty_cache=lambda: None, get_memory_info=lambda: (free[0], 1 << 40)
        )
        patch.setattr(torch, "accelerator", memory)
        yield cuda
