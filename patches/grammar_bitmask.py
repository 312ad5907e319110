"""Hands a step's grammar bitmask to the TwoTower sampler (upstream: vllm/v1/worker/gpu/structured_outputs.py)."""

import functools
from collections.abc import Callable
from typing import Any


def keeping_bitmask(upstream_apply: Callable) -> Callable:
    """Keep the bitmask with TwoTower's logits; apply it to any other model's as before.

    From vLLM 0.33 on every request has a row for each position of its canvas. The first is that of its next token.
    """
    from vllm_twotower.model.step_logits import StepLogits

    @functools.wraps(upstream_apply)
    def apply(self: Any, logits: Any, input_batch: Any, grammar_req_ids: Any, grammar_bitmask: Any) -> None:
        if isinstance(logits, StepLogits):
            logits.grammar = (grammar_req_ids, grammar_bitmask[:: len(grammar_bitmask) // len(grammar_req_ids)])
        else:
            upstream_apply(self, logits, input_batch, grammar_req_ids, grammar_bitmask)

    return apply
