"""What a pass costs the host: few launches outside of CUDA graphs, and what one of them holds."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import golden_data
import pytest
import torch
from engines import generate, running_engine
from launches import Launches, counted_launches
from stand_in_graphs import stand_in_cuda
from torch_layers import torch_attention, torch_layers
from vllm import LLM, SamplingParams
from vllm.config.compilation import CUDAGraphMode

from vllm_twotower.engine.fill import StepFill
from vllm_twotower.engine.pass_graphs import PassDescriptor, PassGraphs, PassKind
from vllm_twotower.planning.released import RELEASED_CONFIG

NARROW = {
    "hidden_size": 64,
    "vocab_size": 320,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 8,
    "n_routed_experts": 8,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 32,
    "intermediate_size": 32,
    "max_position_embeddings": 1024,
    "torch_dtype": "float32",
}


def nodes(folder: Path) -> dict[PassKind, Counter[str]]:
    """What the graphs hold of the released model's layers, at small widths."""
    (folder / "config.json").write_text(json.dumps(RELEASED_CONFIG | NARROW))
    options = {"load_format": "dummy", "skip_tokenizer_init": True, "max_model_len": 256}
    with torch_attention(), running_engine(folder, **options) as llm, stand_in_cuda(llm, (8,)) as cuda:
        passes, found = cuda.state.capturable_passes(cuda.runner.attn_groups), {}
        graphs = cuda.make_graphs()
        with torch.inference_mode(), torch_layers(cuda.layers, cuda.state.planner.state_block_size):
            for [desc] in (
                [desc for desc in graphs._capture_descs[CUDAGraphMode.FULL] if desc.kind is kind] for kind in PassKind
            ):
                passes.prepare()
                passes.run(desc)
                with counted_launches() as found[desc.kind]:
                    passes.run(desc)
    return found


def test_nodes_of_a_graph(tmp_path: Path) -> None:
    """Beside the thirteen launches of vLLM's experts in each of 23 layers; docs/performance.md has the counts."""
    for kind, counts in nodes(tmp_path).items():
        assert counts["experts"] == 23 * 13
        assert counts.total() - counts["experts"] <= 400, (kind, counts)


def test_launches_outside_of_graphs() -> None:
    """Beside a copy to the device, the replay and a copy back: those that read tokens behind texts, and drafts."""
    with torch_attention(), running_engine(golden_data.checkpoint("A")) as llm, stand_in_cuda(llm, (4,)) as cuda:
        graphs, fill = cuda.capture(), StepFill.run
        for mode, most in (("mask_diffusion", 0), ("ar", 1), ("verified", 2)):
            assert of_mode(llm, mode, graphs, fill) <= most


def of_mode(llm: LLM, mode: str, graphs: PassGraphs, fill: Callable[..., None]) -> float:
    """Launches for each replay, while blocks of four requests are filled."""
    launches, replays = Launches(), []

    def replay(desc: PassDescriptor) -> None:
        replays.append(desc)
        launches.one("replays", 0, partial(PassGraphs.replay, graphs))(desc)

    def counted(*args: Any) -> None:
        with launches:
            fill(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "replay", replay)
        patch.setattr(StepFill, "run", counted)
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=33, extra_args={"diffusion_mode": mode})
        generate(llm, [list(range(4, 20))] * 4, [params] * 4)
    assert len(replays) > 10
    return launches.counts["other operations"] / len(replays)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for kind, counts in nodes(Path(folder)).items():
            print(kind.value, counts.total(), dict(counts))
