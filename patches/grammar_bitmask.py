"""Hands a step's grammar bitmask to the TwoTower sampler (upstream: vllm/v1/worker/gpu/structured_outputs.py)."""

import functools
from typing import Any

from vllm_twotower.patches.registry import Patch, everywhere, locate, replace

APPLY = "vllm.v1.worker.gpu.structured_outputs:StructuredOutputsWorker.apply_grammar_bitmask"


def install_apply() -> None:
    """Keep the bitmask with TwoTower's logits; apply it to any other model's as before."""
    from vllm_twotower.model.step_logits import StepLogits

    holder, name = locate(APPLY)
    upstream_apply = getattr(holder, name)

    @functools.wraps(upstream_apply)
    def apply(self: Any, logits: Any, input_batch: Any, grammar_req_ids: Any, grammar_bitmask: Any) -> None:
        if isinstance(logits, StepLogits):
            logits.grammar = (grammar_req_ids, grammar_bitmask)
        else:
            upstream_apply(self, logits, input_batch, grammar_req_ids, grammar_bitmask)

    replace(APPLY, apply)


PATCHES = (
    Patch(
        name="grammar-bitmask",
        target=APPLY,
        what="StructuredOutputsWorker.apply_grammar_bitmask leaves the bitmask in TwoTower's StepLogits.",
        why="Upstream expects one tensor with the batch's logit rows; TwoTower's rows lie in two, by tower. Its kernel "
        "does not run on a CPU without Triton either.",
        upstream="not reported",
        remove_when="a custom sampler gets the grammar's bitmask itself",
        applies_when=everywhere,
        sources=(APPLY,),
        source_sha256={
            "0.32.0": "9aa022bc39639a0d0dbdfa61fb0c2664b55e13b20e1d8814931affbcb5d8c8d9",
            "0.33.0": "ab58a087cbd26fff9c06b18de0c8ee859f3f082fcc30c92154c074eda7a63db1",
        },
        install=install_apply,
    ),
)
