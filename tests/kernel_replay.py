"""One block of every mode by passes that are replayed with the Triton kernels in them, in Triton's interpreter.

python kernel_replay.py prints the tokens of each mode without and with graphs, and which kernels ran.
"""

from __future__ import annotations

import inspect
import json
import os
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

import golden_data
import pytest
import torch
from engines import generate, running_engine, tokens_of
from stand_in_graphs import stand_in_cuda
from torch_layers import torch_attention
from vllm import SamplingParams

from vllm_twotower import kernels
from vllm_twotower.engine import decision
from vllm_twotower.model import context, denoiser, step_logits
from vllm_twotower.sampling import strategies

SCHEMAS = {
    "commit_states": "(Tensor xbc, Tensor x, Tensor dt, Tensor dt_bias, Tensor a, Tensor b, Tensor counts, "
    "Tensor(a!) conv_states, Tensor(b!) states, Tensor indices) -> ()",
    "drawn": "(Tensor logits, Tensor parts, Tensor largest, Tensor temperature, Tensor target, int? never) "
    "-> (Tensor, Tensor)",
    "gated_residual_norm": "(Tensor x, Tensor? mixed, Tensor? gate, Tensor shift, Tensor scale, Tensor weight, "
    "float eps, bool before, Tensor? is_padding) -> (Tensor, Tensor)",
    "masses": "(Tensor logits, Tensor largest, Tensor temperature, int? never) -> Tensor",
    "most_confident": "(Tensor confidence, Tensor masked, Tensor threshold, Tensor step, Tensor max_steps) -> Tensor",
    "row_statistics": "(Tensor logits, int? never, bool needs_second) -> (Tensor, Tensor, Tensor, Tensor)",
    "seeded_conv": "(Tensor xbc, Tensor states, Tensor indices, Tensor weight, Tensor? bias) -> Tensor",
    "seeded_scan": "(Tensor x, Tensor dt, Tensor dt_bias, Tensor a, Tensor b, Tensor c, Tensor d, Tensor states, "
    "Tensor indices, Tensor(a!) out, Tensor? lengths) -> ()",
    "uniform": "(Tensor seed, Tensor[] counters) -> Tensor",
}
"""So that the recorder sees a launch as one call."""
OPERATORS = torch.library.Library("two_tower_kernels", "DEF")
MODES = ("mask_diffusion", "ar", "verified")
ran: Counter[str] = Counter()


def operation(name: str) -> Callable[..., Any]:
    """The kernel as an operation of torch."""
    in_torch = getattr(kernels, name).__wrapped__
    module = import_module(f"vllm_twotower.kernels.on_gpu.{in_torch.__module__.rpartition('.')[2]}")
    on_gpu, signature = getattr(module, name), inspect.signature(in_torch)

    def launch(*args: Any) -> Any:
        ran[name] += 1
        with torch._C.DisableTorchFunction():  # the interpreter reads values on the host
            return on_gpu(args[0], *args[1]) if name == "uniform" else on_gpu(*args)

    OPERATORS.define(name + SCHEMAS[name])
    OPERATORS.impl(name, launch, "CPU")
    defined = getattr(torch.ops.two_tower_kernels, name).default

    def call(*args: Any, **kwargs: Any) -> Any:
        if name == "uniform":
            return defined(args[0], torch.broadcast_tensors(*args[1:]))
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return defined(*bound.arguments.values())

    return call


def main() -> None:
    """Runs everything."""
    prompt = list(range(4, 24))
    params = [
        SamplingParams(temperature=0.7, seed=1, ignore_eos=True, max_tokens=17, extra_args={"diffusion_mode": mode})
        for mode in MODES
    ]
    with torch_attention(), running_engine(golden_data.checkpoint("A")) as llm, stand_in_cuda(llm, (1,)) as cuda:
        expected = [tokens_of(generate(llm, [prompt], [one])) for one in params]
        with pytest.MonkeyPatch.context() as patch:
            for name in kernels.__all__:
                kernel = operation(name)
                for module in (context, decision, denoiser, step_logits, strategies):
                    if hasattr(module, name):
                        patch.setattr(module, name, kernel)
            cuda.capture()
            replayed = [tokens_of(generate(llm, [prompt], [one])) for one in params]
    print(json.dumps({"expected": expected, "replayed": replayed, "ran": ran}))


if __name__ == "__main__":
    main()
