"""The goldens on a GPU in fp32, and a run in bf16; skipped where there is no CUDA."""

from __future__ import annotations

from collections.abc import Iterator

import golden_data
import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


SHARED = {"gpu_memory_utilization": 0.1}  # test processes may share the device


@pytest.fixture(autouse=True, scope="module")
def without_tf32() -> Iterator[None]:
    """TF32 would round the goldens' decisions differently; Triton's products are the engine's own concern."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("enforce_eager", [False, True], ids=["graphs", "eager"])
@pytest.mark.parametrize("name", golden_data.CHECKPOINTS)
def test_goldens_in_fp32(name: str, enforce_eager: bool) -> None:
    from engines import assert_idle, generate, run_all, runner, running_engine, tokens_of
    from vllm import SamplingParams

    runs = golden_data.diffusion_runs(name) + golden_data.diffusion_runs(name, "eos_runs")
    prompts = golden_data.prompts(name)
    with running_engine(golden_data.checkpoint(name), enforce_eager=enforce_eager, **SHARED) as llm:
        graphs = runner(llm).cudagraph_manager
        assert bool(graphs.graphs) != enforce_eager
        assert run_all(llm, runs) == [run.tokens for run in runs]
        assert run_all(llm, runs[::5]) == [run.tokens for run in runs[::5]]
        params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, extra_args={"diffusion_mode": "ar"})
        outputs = generate(llm, [prompt["ids"] for prompt in prompts], [params] * len(prompts))
        assert tokens_of(outputs) == [tuple(prompt["ar"]["new_ids"]) for prompt in prompts]
        assert_idle(llm)


@pytest.mark.parametrize("name", golden_data.CHECKPOINTS)
def test_traces_of_graphs_in_fp32(name: str) -> None:
    """Canvases and times of every pass, and what is traced of drafts and of single tokens."""
    from comparisons import assert_same_traces
    from engines import generate, running_engine
    from vllm import SamplingParams

    runs = [run for run in golden_data.diffusion_runs(name) if run.blocks]
    asked = [run.params(extra_args=run.params().extra_args | {"diffusion_trace": "passes"}) for run in runs]
    modes = [{"diffusion_mode": mode, "diffusion_trace": "tokens"} for mode in ("ar", "verified")] * 4
    others = [SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, extra_args=extra) for extra in modes]
    traces = []
    for enforce_eager in (False, True):
        with running_engine(golden_data.checkpoint(name), enforce_eager=enforce_eager, **SHARED) as llm:
            outputs = generate(llm, [run.prompt for run in runs], asked)
            outputs += generate(llm, [runs[0].prompt] * len(others), others)
            traces.append([output.outputs[0].diffusion_trace for output in outputs])
    for run, trace in zip(runs, traces[0], strict=False):
        found = [list(zip(block.t, map(tuple, block.canvases), strict=True)) for block in trace.blocks]
        assert found == [[(pytest.approx(t), after) for t, _, after in block] for block in run.blocks]
    for graphs, eager in zip(*traces, strict=True):
        assert_same_traces(graphs, eager)


@pytest.mark.parametrize("name", golden_data.CHECKPOINTS)
def test_bf16_runs(name: str) -> None:
    """Rounding changes tokens, so only what must hold anyway: lengths, ids in the vocabulary, no mask token."""
    from engines import assert_idle, run_all, running_engine

    runs = golden_data.diffusion_runs(name)
    with running_engine(golden_data.checkpoint(name), dtype="bfloat16", **SHARED) as llm:
        for run, tokens in zip(runs, run_all(llm, runs), strict=True):
            assert len(tokens) == run.max_new_tokens
            assert all(0 <= token < 320 and token != run.mask_token_id for token in tokens)
        assert_idle(llm)


def test_every_option_equals_the_oracle() -> None:
    """Random requests of all modes with all options, in one batch."""
    import random

    from comparisons import model
    from engines import assert_idle, generate, running_engine
    from oracle import expected
    from random_requests import draw_request

    rng = random.Random(1)
    requests = [draw_request(rng) for _ in range(64)]
    with running_engine(golden_data.checkpoint("A"), max_num_seqs=64, **SHARED) as llm:
        outputs = generate(llm, [request.prompt for request in requests], [request.params() for request in requests])
        for request, output in zip(requests, outputs, strict=True):
            want = expected(model(), request.prompt, request.params(llm.get_tokenizer()))
            assert list(output.outputs[0].token_ids) == want.token_ids
            assert output.outputs[0].finish_reason == want.finish_reason
        assert_idle(llm)


def test_prompts_in_chunks_of_sixteen_tokens() -> None:
    """From the state of the chunk before, as blocks are read: the same log-probabilities as of the whole prompt."""
    from engines import generate, running_engine
    from vllm import SamplingParams

    prompts = [list(range(5 + i, 5 + i + 80)) for i in range(4)]
    params = [SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)] * len(prompts)
    found = []
    for options in ({}, {"long_prefill_token_threshold": 16}):
        with running_engine(golden_data.checkpoint("A"), enforce_eager=True, **options, **SHARED) as llm:
            outputs = generate(llm, prompts, params)
        found.append(
            [
                entry[token].logprob
                for prompt, output in zip(prompts, outputs, strict=True)
                for token, entry in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
            ]
        )
    assert found[0] == pytest.approx(found[1], abs=1e-3)


KERNELS = ["commit", "conv", "draw", "norm", "scan", "statistics", "uniform", "unmask"]


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_equal_torch(kernel: str) -> None:
    """The cases that run in Triton's interpreter elsewhere."""
    from kernel_cases import CASES, calls, error

    for (_, arguments), (of_kernel, of_torch) in zip(CASES[kernel], calls(kernel, "cuda"), strict=True):
        assert error(of_kernel(), of_torch()) < (2e-2 if "dtype" in arguments else 1e-4), arguments
