"""The passes that CUDA graphs hold, each from the buffers to what it decides."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context

from .pass_decision import Decided, PassDecision
from .pass_graphs import PassDescriptor, PassKind
from .pass_plan import Towers
from .pass_planner import PassPlanner, TowerGroups
from .targets import Canvases
from .tower_rows import DeviceRows


class CapturedPasses:
    """The passes as they are captured: from buffers to what is decided, with nothing from the host in between."""

    def __init__(
        self,
        planner: PassPlanner,
        model: Towers,
        decision: PassDecision,
        groups: TowerGroups,
        vllm_config: VllmConfig,
    ):
        self._planner, self._model, self._decision, self._groups = planner, model, decision, groups
        self._vllm_config = vllm_config

    def prepare(self) -> None:
        """Puts rows of no request into the buffers."""
        self._planner.clear_buffers()

    def run(self, desc: PassDescriptor) -> Decided | None:
        """The pass on the rows that are in the buffers: what it decides, if it decides anything."""
        rows = self._planner.buffered_rows(desc)
        with set_forward_context({}, self._vllm_config, num_tokens=desc.num_tokens):
            return {
                PassKind.DENOISE: self._denoise,
                PassKind.VERIFY: self._verify,
                PassKind.READ: self._read,
                PassKind.NEXT_TOKEN: self._next_token,
            }[desc.kind](rows)

    def _denoise(self, rows: DeviceRows) -> Decided:
        canvases = Canvases(rows, self._planner.table)
        hidden = self._planner.canvas_inputs(canvases, self._groups).run(self._model)
        [(_, decided)] = self._decision.canvases(canvases, hidden, self._model.denoiser_head, len(hidden))
        return decided

    def _verify(self, rows: DeviceRows) -> Decided:
        drafted, inputs = self._planner.draft_inputs(rows, self._groups)
        hidden = inputs.run(self._model)
        [(_, decided)] = self._decision.next_tokens(drafted, hidden, self._model.context_head, len(hidden))
        self._planner.advance_states(inputs, decided.outcome[:, 0])
        return decided

    def _read(self, rows: DeviceRows) -> None:
        inputs = self._planner.read_inputs(rows, self._groups)
        inputs.run(self._model)
        self._planner.advance_states(inputs, rows.lengths)

    def _next_token(self, rows: DeviceRows) -> Decided:
        targets, inputs = self._planner.next_token_inputs(rows, self._groups)
        hidden = inputs.run(self._model)
        [(_, decided)] = self._decision.next_tokens(targets, hidden, self._model.context_head, len(hidden))
        return decided
