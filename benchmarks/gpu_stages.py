"""The stages of ``gpu.py``, each a process of its own: ``python benchmarks/gpu_stages.py STAGE FILE``.

A stage writes its rows to FILE as they come. What it runs on is its :class:`Setting`.
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))  # the goldens, the oracle, the kernels' cases, engines in this process

import golden_data  # noqa: E402
import pass_times  # noqa: E402
import torch  # noqa: E402
from engines import core, generate, run_all, runner, running_engine, tokens_of  # noqa: E402
from pass_times import PASSES  # noqa: E402

from vllm_twotower.architecture import TwoTowerConfig  # noqa: E402
from vllm_twotower.planning.model_size import ModelSize  # noqa: E402
from vllm_twotower.planning.released import RELEASED_CONFIG  # noqa: E402

LAYERS = "MEM*E"
"""Of each tower: as many Mamba and MoE layers, and attention, in the released model's proportions as five can have."""

SHARED = {"gpu_memory_utilization": 0.1}
"""The share of the memory that must be free at an engine's start: torch may still hold that of the one before."""


@dataclass(frozen=True)
class Setting:
    """What the stages run on: a device, a model's ``config.json``, its dtype, and options of its engines.

    ``rows`` are numbers of requests, of ``context`` tokens each. An engine whose memory is profiled takes
    ``memory_share`` of the device's.
    """

    device: str = "cuda"
    config: dict[str, Any] = field(
        default_factory=lambda: RELEASED_CONFIG | {"hybrid_override_pattern": LAYERS, "num_hidden_layers": len(LAYERS)}
    )
    dtype: str = "bfloat16"
    rows: tuple[int, ...] = (1, 8, 64)
    context: int = 256
    options: dict[str, Any] = field(default_factory=lambda: {"kv_cache_memory_bytes": 4 << 30, **SHARED})
    memory_share: float = 0.8


class Rows:
    """The rows of a stage's result, in a file that always holds those so far."""

    def __init__(self, file: Path):
        self._file, self._rows = file, []

    def add(
        self, what: str, figure: float | str, unit: str = "", other: str = "", other_figure: float | None = None
    ) -> None:
        """Adds a figure, or a fact in words, and what it is compared with."""
        row = {"what": what, "figure": figure, "unit": unit, "other": other, "other_figure": other_figure}
        self._rows.append(row)
        written = self._file.with_suffix(".new")
        written.write_text(json.dumps(self._rows))
        written.replace(self._file)


def card(setting: Setting, rows: Rows) -> None:
    """What the other stages run on."""
    if setting.device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        capability = "".join(map(str, torch.cuda.get_device_capability()))
        rows.add("card", f"{torch.cuda.get_device_name()} (sm_{capability})")
        rows.add("driver", f"driver {subprocess.check_output(query, text=True).splitlines()[0]}")
        rows.add("memory", torch.cuda.get_device_properties(0).total_memory / 1e9, "GB")
    rows.add("CUDA", f"CUDA {torch.version.cuda}")
    rows.add("Python", f"Python {platform.python_version()}")
    for package in ("torch", "triton", "vllm", "vllm-twotower"):
        rows.add(package, f"{package} {version(package)}")
    rows.add("copy of 1 GiB", bandwidth(setting) / 1e9, "GB/s")


def bandwidth(setting: Setting, size: int = 1 << 30) -> float:
    """Bytes/s read and written by a copy of so many bytes."""
    source = torch.ones(size, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    return 2 * size / seconds_of(setting, lambda: target.copy_(source))


def seconds_of(setting: Setting, function: Callable[[], Any], times: int = 20) -> float:
    """Mean seconds of a call, launches included."""
    for _ in range(3):
        function()
    synchronise(setting)
    started = time.perf_counter()
    for _ in range(times):
        function()
    synchronise(setting)
    return (time.perf_counter() - started) / times


def synchronise(setting: Setting) -> None:
    """Waits for the device."""
    if setting.device == "cuda":
        torch.cuda.synchronize()


def kernels(setting: Setting, rows: Rows) -> None:
    """Each case of each Triton kernel: how far from torch, and how long both take."""
    from kernel_cases import CASES, calls, error

    without_tf32()
    wrong = []
    for kernel, cases in CASES.items():
        for (_, arguments), (of_kernel, of_torch) in zip(cases, calls(kernel, setting.device), strict=True):
            sizes = ", ".join(f"{name} {str(value).removeprefix('torch.')}" for name, value in arguments.items())
            difference = error(of_kernel(), of_torch())
            if difference > (2e-2 if "dtype" in arguments else 1e-4):
                wrong.append(kernel)
            mine, its = (seconds_of(setting, function) * 1e6 for function in (of_kernel, of_torch))
            rows.add(f"{kernel} ({sizes}), largest error {difference:.1e}", mine, "us", "torch", its)
    if wrong:
        raise SystemExit(f"not what torch gives: {', '.join(wrong)}")


def without_tf32() -> None:
    """Products of fp32 in fp32; Triton's in engines are the engine's own concern."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def goldens(setting: Setting, rows: Rows) -> None:
    """Texts that equal NVIDIA's in every token, without CUDA graphs and with what is the default."""
    from vllm import SamplingParams

    without_tf32()
    differing = 0
    for name in golden_data.CHECKPOINTS:
        runs = golden_data.diffusion_runs(name) + golden_data.diffusion_runs(name, "eos_runs")
        prompts = golden_data.prompts(name)
        params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, extra_args={"diffusion_mode": "ar"})
        wanted = [run.tokens for run in runs] + [tuple(prompt["ar"]["new_ids"]) for prompt in prompts]
        for graphs, options in (("eager", {"enforce_eager": True}), ("default", {})):
            with running_engine(golden_data.checkpoint(name), **SHARED, **options) as llm:
                got = run_all(llm, runs)
                got += tokens_of(generate(llm, [prompt["ids"] for prompt in prompts], [params] * len(prompts)))
            equal = sum(mine == its for mine, its in zip(got, wanted, strict=True))
            differing += len(wanted) - equal
            rows.add(f"checkpoint {name}, {graphs}: equal texts", equal, "", "all", len(wanted))
    refuse(differing)


def options(setting: Setting, rows: Rows, count: int = 32) -> None:
    """Texts of random requests that equal the plain model's, and where the host waited for the device."""
    from comparisons import model
    from oracle import expected
    from random_requests import draw_request

    without_tf32()
    rng = random.Random(1)
    requests = [draw_request(rng) for _ in range(count)]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with running_engine(golden_data.checkpoint("A"), max_num_seqs=count, **SHARED) as llm:
            tokenizer = llm.get_tokenizer()
            outputs = generate(
                llm, [request.prompt for request in requests], [request.params() for request in requests]
            )
    for (place, line), times in Counter(places(seen)).most_common(10):
        rows.add(f"waits for the device at {place}:{line}", times)
    equal = 0
    for request, output in zip(requests, outputs, strict=True):
        want = expected(model(), request.prompt, request.params(tokenizer))
        equal += list(output.outputs[0].token_ids) == want.token_ids
    rows.add("equal texts", equal, "", "all", count)
    refuse(count - equal)


def refuse(differing: int) -> None:
    """Ends the stage as failed if texts differ."""
    if differing:
        raise SystemExit(f"{differing} texts differ")


def places(seen: list[warnings.WarningMessage]) -> Iterator[tuple[str, int]]:
    """Where torch or vLLM warned that the host waits for the device: file and line."""
    for warning in seen:
        if "synchroni" in str(warning.message):  # synchronizing, synchronous
            yield "/".join(Path(warning.filename).parts[-3:]), warning.lineno


def passes(setting: Setting, rows: Rows) -> None:
    """The passes of five layers with random weights: by number of rows, eager and by default, by FlashAttention."""
    rate = bandwidth(setting)
    floors: dict[tuple[str, int], float] = {}
    variants: list[tuple[str, dict[str, Any], bool]] = [
        ("eager", {"enforce_eager": True}, False),
        ("default", {}, False),
    ]
    if {3, 4} <= flash_attention_versions():
        variants.append(("default, without FlashAttention 4", {}, True))
    for name, engine_options, hides_newest in variants:
        with hidden_flash_attention_4(hides_newest):
            add_passes(setting, rows, name, engine_options, floors, rate)


def add_passes(
    setting: Setting, rows: Rows, name: str, options: dict[str, Any], floors: dict[tuple[str, int], float], rate: float
) -> None:
    """Adds times and launches of the passes of an engine; an eager one says what ``floors`` are."""
    with five_layers(setting, **options) as llm:
        described = f"{name}, {attention_of(runner(llm).get_model())}"
        for num_rows in setting.rows:
            if options.get("enforce_eager"):
                floors |= weight_seconds(setting, llm, num_rows, rate)
            pass_times.passes(llm, num_rows, setting.context, pass_times.seconds, blocks=3)  # warm up
            add_times(setting, rows, llm, num_rows, described, floors)
        counted = pass_times.passes(llm, 1, setting.context, pass_times.launches, blocks=3)
        for kind in "DCA":
            rows.add(f"launches of {kind}, 1 row, {described}", getattr(counted, kind))


def add_times(
    setting: Setting, rows: Rows, llm: Any, num_rows: int, described: str, floors: dict[tuple[str, int], float]
) -> None:
    """Adds the times of the passes of an engine, beside those of reading their weights."""
    times = pass_times.passes(llm, num_rows, setting.context, pass_times.seconds)
    of_rows = f"{num_rows} {'row' if num_rows == 1 else 'rows'}"
    for kind in "DCA":
        floor = floors.get((kind, num_rows))
        other = ("reading its weights", floor * 1e3) if floor else ()
        rows.add(f"{kind}, {of_rows}, {described}", getattr(times, kind) * 1e3, "ms", *other)
    rows.add(f"rest of a step with one D, {of_rows}, {described}", times.around_D * 1e3, "ms")
    rows.add(f"rest of a step with one A, {of_rows}, {described}", times.around_A * 1e3, "ms")


def weight_seconds(setting: Setting, llm: Any, num_rows: int, rate: float) -> dict[tuple[str, int], float]:
    """Seconds for reading the weights that each pass needs, at a memory's rate, by pass and rows.

    Of the experts those count that the engine's own requests have really been routed to.
    """
    config = TwoTowerConfig.from_dict(setting.config)
    element = getattr(torch, setting.dtype).itemsize
    size = ModelSize.of(config, 1, element, element, 4)
    tokens = num_rows * config.canvas_length
    with pass_times.routed(runner(llm).get_model(), config.num_experts_per_tok) as of_ar:
        pass_times.run(llm, num_rows, setting.context, "ar", 1, pass_times.seconds, blocks=4)
    with pass_times.routed(runner(llm).get_model(), config.num_experts_per_tok) as of_diffusion:
        pass_times.run(llm, num_rows, setting.context, "mask_diffusion", 1, pass_times.seconds, blocks=2)
    experts = {
        "A": of_ar["context_tower", num_rows],
        "C": of_diffusion["context_tower", tokens],
        "D": of_diffusion["denoiser_tower", tokens],
    }
    rest = {"A": size.head_bytes, "C": 0.0, "D": size.head_bytes + size.time_bytes}
    return {
        (kind, num_rows): (size.dense_bytes + rest[kind] + read_bytes(size, experts[kind])) / rate for kind in "ACD"
    }


def read_bytes(size: ModelSize, experts: list[int]) -> float:
    """Bytes of experts that a pass reads on average; ``experts`` are the distinct ones of each layer and pass."""
    return size.num_moe_layers * statistics.mean(experts) * size.expert_bytes if size.num_moe_layers else 0.0


def nemotron_h(setting: Setting, rows: Rows) -> None:
    """vLLM's own model of the same widths and number of layers, as it is served by default: a token of one request."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)

    def of_vllm(llm: Any) -> float:
        steps = pass_times.drive(llm, prompts, params, pass_times.seconds)
        return sum(steps.figures) / params.max_tokens

    def of_two_tower(llm: Any) -> dict[int, float]:
        def usual(per_step: int) -> float:
            return pass_times.run(llm, 1, setting.context, "ar", per_step, pass_times.seconds, blocks=8).usual

        return {per_step: second_of(usual, per_step) / per_step for per_step in (1, PASSES)}

    prompts = pass_times.prompts_of(1, setting.context, setting.config["vocab_size"])
    theirs = in_engine(setting, lambda llm: second_of(of_vllm, llm), architecture="NemotronHForCausalLM")
    rows.add("a token of one request, vLLM's Nemotron-H", theirs * 1e3, "ms")
    for per_step, ours in in_engine(setting, of_two_tower).items():
        what = f"a token of one request, mode ar, {per_step} a step"
        rows.add(what, ours * 1e3, "ms", "vLLM's Nemotron-H", theirs * 1e3)


def second_of(function: Callable[[Any], float], argument: Any) -> float:
    """The result of a second call, when everything is compiled."""
    function(argument)
    return function(argument)


def kernel_times(setting: Setting, rows: Rows, most: int = 15) -> None:
    """The kernels that a denoiser pass over the most rows spends its time in."""
    num_rows, found = max(setting.rows), []

    def measure(step: Callable[[], Any]) -> tuple[Any, float]:
        result, events = pass_times.profiled(step)
        found.append({event.key: (event.count, device_time(event)) for event in events if device_time(event)})
        return result, sum(spent for _, spent in found[-1].values())

    with five_layers(setting) as llm:
        for per_step in (1, PASSES):  # warm up
            pass_times.run(llm, num_rows, setting.context, "mask_diffusion", per_step, pass_times.seconds, blocks=2)
        steps = pass_times.run(llm, num_rows, setting.context, "mask_diffusion", 1, measure, blocks=2)
    further = steps.further
    events = found[steps.figures.index(min(steps.figures, key=lambda figure: abs(figure - further)))]
    whole = sum(spent for _, spent in events.values())
    for name, (count, spent) in sorted(events.items(), key=lambda item: -item[1][1])[:most]:
        rows.add(f"{name.replace('|', '/')[:80]}, {count} times", spent, "us", "all of them", whole)


def device_time(event: Any) -> float:
    """Microseconds of a kernel, 0 for what the profiler has of the host."""
    is_kernel = event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    return event.self_device_time_total if is_kernel else 0.0


def fp8(setting: Setting, rows: Rows) -> None:
    """Weights that are quantised while they are loaded: memory, and the passes of one row.

    Of both kinds vLLM's dummy weights, which route all tokens to much the same experts.
    """

    def measure(name: str, llm: Any) -> None:
        rows.add(f"memory of {name}", runner(llm).model_memory_usage / 1e9, "GB")
        pass_times.passes(llm, 1, setting.context, pass_times.seconds, blocks=3)  # warm up
        add_times(setting, rows, llm, 1, name, {})

    for name, quantization in (("bf16", {}), ("fp8_per_channel", {"quantization": "fp8_per_channel"})):
        in_engine(setting, partial(measure, f"dummy weights in {name}"), is_random=False, **quantization)


def graph_memory(setting: Setting, rows: Rows) -> None:
    """What vLLM's profiling expects CUDA graphs to take, and what they take."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    taken, capture = [0], GPUModelRunner.capture_model

    def noted(*args: Any, **kwargs: Any) -> int:
        taken.append(capture(*args, **kwargs))
        return taken[-1]

    profiled = {"kv_cache_memory_bytes": None, "gpu_memory_utilization": setting.memory_share}
    with mock.patch.object(GPUModelRunner, "capture_model", noted), five_layers(setting, **profiled) as llm:
        expected = getattr(core(llm).model_executor.driver_worker.worker, "cudagraph_memory_estimate", 0)
    rows.add("CUDA graphs", taken[-1] / 1e9, "GB", "expected", expected / 1e9)


@contextmanager
def five_layers(
    setting: Setting, architecture: str | None = None, is_random: bool = True, **options: Any
) -> Iterator[Any]:
    """An engine of the setting's layers with random weights, or vLLM's dummy ones; no file is read for them."""
    config = setting.config | ({"architectures": [architecture]} if architecture else {})
    most = max(setting.rows)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        settings = {
            "dtype": setting.dtype,
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "max_num_seqs": most,
            "max_num_batched_tokens": most * setting.context,
            **setting.options,
        }
        with running_engine(Path(folder), **(settings | options)) as llm:
            if is_random:
                pass_times.randomise(runner(llm).get_model())
            yield llm


def in_engine(setting: Setting, function: Callable[[Any], Any], **options: Any) -> Any:
    """What a function gives for an engine of five layers, of which nothing is left then, on the device either."""
    with five_layers(setting, **options) as llm:
        return function(llm)


def flash_attention_versions() -> set[int]:
    """Those that work here."""
    try:
        from vllm.vllm_flash_attn.flash_attn_interface import is_fa_version_supported
    except ImportError:
        return set()
    return {number for number in (2, 3, 4) if is_fa_version_supported(number)}


@contextmanager
def hidden_flash_attention_4(is_hidden: bool) -> Iterator[None]:
    """vLLM takes version 4 for diffusion models wherever it can, also if version 3 is asked for (fa_utils.py)."""
    if not is_hidden:
        yield
        return
    from vllm.vllm_flash_attn import flash_attn_interface as interface

    supported = interface.is_fa_version_supported
    with mock.patch.object(interface, "is_fa_version_supported", lambda number: number != 4 and supported(number)):
        yield


def attention_of(model: torch.nn.Module) -> str:
    """The backend of the denoiser's attention, with FlashAttention's version."""
    [attention, *_] = [
        module for name, module in model.named_modules() if "denoiser" in name and hasattr(module, "attn_backend")
    ]
    number = getattr(attention.impl, "vllm_flash_attn_version", None)
    return attention.attn_backend.get_name() + (f" {number}" if number else "")


STAGES = {
    "card": card,
    "kernels": kernels,
    "goldens": goldens,
    "options": options,
    "passes": passes,
    "nemotron-h": nemotron_h,
    "kernel-times": kernel_times,
    "fp8": fp8,
    "graph-memory": graph_memory,
}


if __name__ == "__main__":
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    STAGES[sys.argv[1]](Setting(), Rows(Path(sys.argv[2])))
