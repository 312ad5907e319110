"""A sharded vocabulary without compilation (upstream: vllm/model_executor/layers/vocab_parallel_embedding.py)."""

import inspect

from vllm_twotower.patches.registry import Patch, locate, replace, runs_on_cpu

MASK = "vllm.model_executor.layers.vocab_parallel_embedding:get_masked_input_and_mask"


def install_uncompiled() -> None:
    """Put the function itself in the place of its compiled form."""
    holder, name = locate(MASK)
    replace(MASK, inspect.unwrap(getattr(holder, name)))


PATCHES = (
    Patch(
        name="embedding-mask",
        target=MASK,
        what="get_masked_input_and_mask runs as it is written, in the processes of TwoTower's ranks.",
        why="It is compiled when a sharded embedding first sees tokens: seconds of the first request.",
        upstream="not reported",
        remove_when="vLLM compiles it before the first request, or not on CPUs",
        applies_when=runs_on_cpu,
        sources=(MASK,),
        source_sha256=dict.fromkeys(
            ("0.32.0", "0.33.0"), "526bdd1bf105489fc7d76472014d6fc3526de12b7cd70647ecb96436d124e77b"
        ),
        install=install_uncompiled,
    ),
)
