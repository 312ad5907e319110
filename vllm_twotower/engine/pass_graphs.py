"""CUDA graphs of passes: what a tower and its decision launch for rows of one width, captured once and replayed.

A graph keeps addresses and every number of the host. So a captured pass reads and writes buffers that stay where they
are, for a fixed number of rows; rows of no request fill it up and are inert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager, ModelCudaGraphManager

from vllm_twotower.options import EngineOptions

from .pass_decision import Decided
from .tower_rows import DeviceRows


class PassKind(Enum):
    """What a graph runs."""

    DENOISE = "denoise"
    """The denoiser over canvases, and what it commits."""
    VERIFY = "verify"
    """The context tower over drafts, the tokens behind each of theirs, and the states after what is accepted."""
    READ = "read"
    """The context tower over blocks that are whole."""
    NEXT_TOKEN = "next token"
    """The context tower over one token, and the one behind it."""


_RUNS = {
    PassKind.DENOISE: "canvases",
    PassKind.VERIFY: "drafts",
    PassKind.READ: "context",
    PassKind.NEXT_TOKEN: "context",
}
"""Which buffers they read."""


@dataclass(frozen=True)
class PassDescriptor(BatchExecutionDescriptor):
    """A graph: a kind of pass for ``num_reqs`` rows."""

    kind: PassKind = PassKind.DENOISE

    @property
    def width(self) -> int:
        """Tokens of a row."""
        return self.num_tokens // self.num_reqs

    @property
    def run(self) -> str:
        """The buffers that it reads."""
        return _RUNS[self.kind]


class CapturablePasses(Protocol):
    """Passes from buffers to what is decided, with nothing from the host in between."""

    def prepare(self) -> None:
        """Rows of no request, so that nothing is written where a request could read it."""

    def run(self, desc: PassDescriptor) -> Decided | None:
        """The pass on the rows that are in the buffers: what it decides, if it decides anything."""


class CapturingModelState(Protocol):
    """The model state: it has the passes, and replays them."""

    def capturable_passes(self, attn_groups: Any) -> CapturablePasses: ...

    def use_graphs(self, graphs: PassGraphs) -> None: ...


class PassGraphs(ModelCudaGraphManager):
    """In the place of vLLM's graphs of whole forward passes, which a step of several passes has no use for.

    vLLM profiles their memory, captures them and shows its progress as it does with its own. Its model runner finds no
    graph for a batch, so it calls the model, which replays the graphs of its passes.
    """

    def _init_candidates(self) -> None:
        alone = EngineOptions.of(self.vllm_config.model_config).context_alone
        self.kinds = (PassKind.NEXT_TOKEN,) if alone else tuple(PassKind)
        width = self.vllm_config.diffusion_config.canvas_length
        sizes = self.compilation_config.cudagraph_capture_sizes if self.cudagraph_mode else None
        self._row_counts = sorted({size // width for size in sizes or ()})
        if self._row_counts:
            self._capture_descs[CUDAGraphMode.FULL] = [
                PassDescriptor(
                    CUDAGraphMode.FULL, rows * (1 if kind is PassKind.NEXT_TOKEN else width), rows, kind=kind
                )
                for rows in reversed(self._row_counts)
                for kind in self.kinds
            ]
            # Outside the graphs' memory, where what one graph leaves another may overwrite.
            shape = (len(PassKind), self._row_counts[-1], 2 + width)
            self._outcomes = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self._traced: dict[PassDescriptor, Callable[[], tuple[Tensor, ...]] | None] = {}

    def capture(
        self,
        model: nn.Module,
        model_state: CapturingModelState,
        input_buffers: Any,
        intermediate_tensors: Any,
        block_tables: Any,
        attn_groups: Any,
        *args: Any,
        progress_bar_desc: str = "Capturing CUDA graphs",
        **options: Any,
    ) -> None:
        """Captures all graphs; the model state finds them from then on."""
        passes = model_state.capturable_passes(attn_groups)

        def create_forward(desc: PassDescriptor, warmup: bool) -> Callable[[CUDAGraphMode], None]:
            passes.prepare()

            def forward(mode: CUDAGraphMode) -> None:
                decided = passes.run(desc)
                if decided is not None:
                    self.outcome(desc).copy_(decided.outcome)
                    self._traced[desc] = decided.traced

            return forward

        CudaGraphManager.capture(self, create_forward, progress_bar_desc)
        model_state.use_graphs(self)

    def find(self, kind: PassKind, num_rows: int) -> PassDescriptor | None:
        """The smallest graph for so many rows, if they are not too many."""
        descs = (desc for desc in self.graphs if desc.kind is kind and desc.num_reqs >= num_rows)
        return min(descs, key=lambda desc: desc.num_reqs, default=None)

    def outcome(self, desc: PassDescriptor) -> Tensor:
        """The outcome of the graph's last replay, see :class:`~.pass_decision.Decided`."""
        return self._outcomes[list(PassKind).index(desc.kind), : desc.num_reqs, : 2 + desc.width]

    def traced(self, desc: PassDescriptor) -> tuple[Tensor, ...]:
        """What is traced of the graph's last replay, before another one in the same memory; of a read nothing."""
        traced = self._traced.get(desc)
        return () if traced is None else traced()

    def replay(self, desc: PassDescriptor) -> None:
        """Runs the pass on what was sent to the buffers."""
        CudaGraphManager.run_fullgraph(self, desc)


@dataclass
class Replay:
    """In the place of a run's inputs: the run is a graph's, for some rows, of which some may be traced."""

    graphs: PassGraphs
    desc: PassDescriptor
    rows: DeviceRows
    is_traced: bool
    traced: tuple[Tensor, ...] = ()
    logits_indices: None = None
    prompt_tokens: None = None

    @property
    def num_tokens(self) -> int:
        return self.desc.num_tokens

    def run(self, model: nn.Module) -> None:
        self.graphs.replay(self.desc)
        if self.is_traced:
            self.traced = self.graphs.traced(self.desc)

    @property
    def decided(self) -> Decided:
        """What the run has decided."""
        return Decided(self.graphs.outcome(self.desc), (lambda: self.traced) if self.is_traced else None)
