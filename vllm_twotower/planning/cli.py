"""The command `vllm-twotower plan`: step times, tokens/s and memory of both modes on given hardware, from formulas."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_twotower.parallel import TENSOR_PARALLEL_SIZES, check_tensor_parallel_size, tensor_parallel_obstacle

from .accepted_tokens import AcceptedTokens
from .cost_model import CostModel, Load
from .hardware import DEVICES, Hardware
from .mode_choice import ModeChooser
from .released import RELEASED_CONFIG
from .simulator import Traffic, simulate
from .steps_per_block import StepsPerBlock

if TYPE_CHECKING:
    from vllm_twotower.architecture import TwoTowerConfig

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 1}
USABLE_MEMORY = 0.9
"""Share of a GPU's memory for weights and caches; vLLM's default of --gpu-memory-utilization is 0.92."""


def _positive(kind: type, what: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < inf:
            raise argparse.ArgumentTypeError(f"{text!r} is no {what} above 0")
        return value

    return parse


_whole, _number = _positive(int, "whole number"), _positive(float, "number")


def _not_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 on")
    return value


def _share(text: str) -> float:
    value = _not_negative(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r} does not lie in 0 ... 1")
    return value


def _model(text: str) -> dict[str, Any]:
    """The configuration of a checkpoint folder, or of the released model."""
    if text == "released":
        return RELEASED_CONFIG
    try:
        config = json.loads((Path(text) / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither 'released' nor a folder with a config.json: {error}"
        ) from None
    cache_dtype = config.get("mamba_ssm_cache_dtype", "float32")
    if cache_dtype not in DTYPE_BYTES:
        raise argparse.ArgumentTypeError(
            f"{text!r}: its mamba_ssm_cache_dtype is {cache_dtype!r}, known are {', '.join(DTYPE_BYTES)}"
        )
    return config


def _steps_per_block(text: str) -> StepsPerBlock:
    try:
        mean = float(text)
    except ValueError:
        try:
            return StepsPerBlock.of_metrics(Path(text).read_text())
        except (OSError, ValueError) as error:
            raise argparse.ArgumentTypeError(
                f"{text!r} is neither a mean nor a file with the metrics of a server: {error}"
            ) from None
    if not 1 <= mean < inf:
        raise argparse.ArgumentTypeError(f"{text!r}: a block takes at least 1 pass")
    return StepsPerBlock.of_mean(mean)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add = parser.add_argument
    add("--model", type=_model, default="released", help="checkpoint folder, or 'released' (default) for NVIDIA's 30B")
    add("--hardware", choices=DEVICES, default="H100", help="a known device (default: %(default)s)")
    add("--bandwidth", type=_number, metavar="GB/S", help="memory bandwidth, instead of the device's")
    add("--flops", type=_number, metavar="TFLOP/S", help="rate of dense matrix products, instead of the device's")
    add("--memory", type=_number, metavar="GB", help="memory of a GPU, instead of the device's")
    add("--link-bandwidth", type=_number, metavar="GB/S", help="between GPUs, one direction, instead of the device's")
    add("--step-overhead", type=_not_negative, metavar="MS", default=0.0, help="of an engine step (default: 0)")
    add("--pass-overhead", type=_not_negative, metavar="MS", default=0.0, help="of a tower pass (default: 0)")
    add("--tensor-parallel-size", type=_whole, default=1, metavar="N", help="GPUs that share a model (default: 1)")
    add("--dtype", choices=DTYPE_BYTES, default="bfloat16", help="of weights and KV cache (default: %(default)s)")
    add("--expert-dtype-bytes", type=_number, metavar="BYTES", help="of a routed expert's weight: FP8 1, 4 bits 0.5")
    add("--routing-correlation", type=_share, default=0.0, metavar="SHARE", help="0 (default): tokens choose their "
        "experts independently; 1: all tokens of a pass choose the same")  # fmt: skip
    add("--batch-sizes", type=_whole, nargs="+", default=[1, 8, 16, 32, 64, 128, 256, 512], metavar="N",
        help="numbers of open requests (default: 1 8 16 ... 512)")  # fmt: skip
    add("--context", type=_whole, default=1024, metavar="TOKENS", help="of each request (default: %(default)s)")
    add("--steps-per-block", type=_steps_per_block, default="5", metavar="MEAN|FILE", help="denoiser passes a block "
        "takes: a mean (default: 5), or what a server's /metrics returned")  # fmt: skip
    add("--passes-per-step", type=_whole, default=1, metavar="N", help="denoiser passes an engine step makes "
        "(default: 1)")  # fmt: skip
    add("--accepted", type=_not_negative, metavar="TOKENS", help="also plan mode verified, with so many accepted "
        "tokens of a draft on average")  # fmt: skip
    add("--draft-steps", type=_whole, default=1, metavar="N", help="denoiser passes of a draft (default: 1)")
    add("--simulate", action="store_true", help="also simulate AR, diffusion and the choice by load at every batch "
        "size; of the context, an eighth is then generated")  # fmt: skip
    add("--json", action="store_true", help="print JSON instead of tables; seconds, bytes, FLOP")


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from vllm_twotower.architecture import CheckpointError

    try:
        plan = make_plan(args)
    except CheckpointError as error:
        raise SystemExit(f"vllm-twotower plan: error: argument --model: {error}") from None
    except ValueError as error:
        name = "accepted" if "accepted tokens" in str(error) else "tensor-parallel-size"
        raise SystemExit(f"vllm-twotower plan: error: argument --{name}: {error}") from None
    print(json.dumps(plan, indent=2) if args.json else as_text(plan))


def _hardware(args: argparse.Namespace) -> Hardware:
    given = {
        "memory_bandwidth": args.bandwidth and args.bandwidth * 1e9,
        "flops": args.flops and args.flops * 1e12,
        "memory_bytes": args.memory and args.memory * 1e9,
        "link_bandwidth": args.link_bandwidth and args.link_bandwidth * 1e9,
    }
    given = {name: value for name, value in given.items() if value}
    hardware = DEVICES[args.hardware]
    if given:
        given |= {"name": f"{hardware.name}, changed", "source": f"given, else {hardware.source}"}
    return replace(
        hardware,
        seconds_per_step=args.step_overhead / 1e3,
        seconds_per_context_pass=args.pass_overhead / 1e3,
        seconds_per_denoiser_pass=args.pass_overhead / 1e3,
        **given,
    )


def make_plan(args: argparse.Namespace) -> dict[str, Any]:
    """The whole answer as plain data in seconds, bytes, FLOP; raises ValueError if the model cannot be divided so."""
    from vllm_twotower.architecture import TwoTowerConfig

    config, hardware = TwoTowerConfig.from_dict(args.model), _hardware(args)
    check_tensor_parallel_size(config, args.tensor_parallel_size)

    def model_with(tensor_parallel_size: int) -> CostModel:
        return CostModel(
            config,
            hardware,
            tensor_parallel_size=tensor_parallel_size,
            dtype_bytes=DTYPE_BYTES[args.dtype],
            expert_dtype_bytes=args.expert_dtype_bytes,
            ssm_dtype_bytes=DTYPE_BYTES[args.model.get("mamba_ssm_cache_dtype", "float32")],
            routing_correlation=args.routing_correlation,
        )

    model = model_with(args.tensor_parallel_size)
    load = Load(1, args.context, args.steps_per_block, args.passes_per_step, draft_steps=args.draft_steps)
    if args.accepted is not None:
        load = load._replace(accepted=AcceptedTokens.of_mean(args.accepted, model.canvas_length - 1))
    loads = [load._replace(num_open=batch) for batch in args.batch_sizes]
    plan = {
        "hardware": asdict(hardware),
        "tensor_parallel_size": args.tensor_parallel_size,
        "context": args.context,
        "passes_per_block": args.steps_per_block.mean,
        "passes_per_step": args.passes_per_step,
        "memory": [_memory(config, model_with, size, args.context) for size in TENSOR_PARALLEL_SIZES],
        "request": {
            "state_bytes": model.size.state_bytes,
            "kv_bytes_per_token": model.size.kv_bytes_per_token,
            "bytes": model.size.request_bytes(args.context),
        },
        "loads": [_at_load(model, load) for load in loads],
        "diffusion_faster": model.crossovers(load),
    }
    if args.accepted is not None:
        plan["verified"] = {
            "accepted": args.accepted,
            "draft_steps": args.draft_steps,
            "tokens_per_second": [model.tokens_per_second("verified", at) for at in loads],
            "speedup": [model.block_seconds("ar", at) / model.block_seconds("verified", at) for at in loads],
            "faster": model.crossovers(load, mode="verified"),
        }
    if args.simulate:
        plan["simulated"] = [_simulated(model, load) for load in loads]
    return plan


def _memory(config: TwoTowerConfig, model_with: Callable[[int], CostModel], size: int, context: int) -> dict[str, Any]:
    if obstacle := tensor_parallel_obstacle(config, size):
        return {"tensor_parallel_size": size, "impossible": obstacle}
    model = model_with(size)
    weights = model.size.weight_bytes
    return {
        "tensor_parallel_size": size,
        "weight_bytes": weights,
        "request_bytes": model.size.request_bytes(context),
        "fits": model.max_requests(context, USABLE_MEMORY) > 0,
        "max_requests": max(0, model.max_requests(context, USABLE_MEMORY)),
    }


def _at_load(model: CostModel, load: Load) -> dict[str, Any]:
    batch, context = load.num_open, load.context_len
    passes = {
        "ar": model.ar_pass(batch, context),
        "denoiser": model.denoiser_pass(batch, context),
        "commit": model.commit_pass(batch, context),
    }
    together = load._replace(passes_per_step=load.steps_per_block.most)
    ar, diffusion = (model.block_seconds(mode, load) for mode in ("ar", "mask_diffusion"))
    return {
        "requests": batch,
        **{f"{name}_pass": {**cost._asdict(), "memory_bytes": cost.memory_bytes} for name, cost in passes.items()},
        "experts_per_denoiser_pass": model.experts_touched(batch * model.canvas_length),
        "ar_tokens_per_second": model.tokens_per_second("ar", load),
        "diffusion_tokens_per_second": model.tokens_per_second("mask_diffusion", load),
        "speedup": ar / diffusion,
        "speedup_in_step": ar / model.block_seconds("mask_diffusion", together),
    }


def _simulated(model: CostModel, load: Load) -> dict[str, Any]:
    batch = int(load.num_open)
    output_blocks = max(1, int(load.context_len) // 8 // model.canvas_length)
    prompt_tokens = max(1, int(load.context_len) - output_blocks * model.canvas_length)
    traffic = Traffic(batch, load.steps_per_block, prompt_tokens, output_blocks, output_blocks // 2)
    result: dict[str, Any] = {"requests": batch}
    for name, mode in (("ar", "ar"), ("diffusion", "mask_diffusion"), ("auto", ModeChooser(model))):
        simulated = simulate(
            model,
            traffic,
            mode,
            passes_per_step=load.passes_per_step,
            warm_up_requests=4 * batch,
            measured_requests=max(64, 4 * batch),
        )
        result[f"{name}_tokens_per_second"] = simulated.tokens_per_second
    result["auto_ar_share"] = simulated.ar_requests / simulated.requests
    return result


def as_text(plan: dict[str, Any]) -> str:
    """The plan as tables."""
    hardware, request = plan["hardware"], plan["request"]
    lines = [
        f"{hardware['name']}: {hardware['memory_bandwidth'] / 1e9:,.0f} GB/s, {hardware['flops'] / 1e12:,.0f} TFLOP/s, "
        f"{hardware['memory_bytes'] / 1e9:,.0f} GB ({hardware['source']})",
        f"Overheads: {hardware['seconds_per_step'] * 1e3:g} ms a step, "
        f"{hardware['seconds_per_context_pass'] * 1e3:g} ms a tower pass",
        "",
        f"A request of {plan['context']} tokens holds {_mb(request['bytes'])} a GPU: {_mb(request['state_bytes'])} of "
        f"Mamba states and {request['kv_bytes_per_token'] / 1e3:.1f} kB a token.",
        "",
        "GPUs  weights on each (GB)  requests that fit",
    ]
    for row in plan["memory"]:
        size = f"{row['tensor_parallel_size']:4}"
        if "impossible" in row:
            lines.append(f"{size}  impossible: {row['impossible']}")
        else:
            fits = f"{row['max_requests']:,}" if row["fits"] else "does not fit"
            lines.append(f"{size}  {row['weight_bytes'] / 1e9:20.2f}  {fits:>17}")
    lines += [
        "",
        f"{plan['tensor_parallel_size']} GPU(s), {plan['passes_per_block']:.2f} denoiser passes a block, "
        f"{plan['passes_per_step']} a step",
        f"{'':8} {'AR step':>17} {'denoiser pass':>26} {'commit':>8} {'tokens/s':>15} {'diffusion / AR':>17}",
        f"{'requests':8} {'ms':>8} {'GB':>8} {'ms':>8} {'GB':>8} {'experts':>8} {'ms':>8} {'AR':>7} {'diff.':>7} "
        f"{'apart':>8} {'in step':>8}",
    ]
    for row in plan["loads"]:
        ar, denoiser, commit = row["ar_pass"], row["denoiser_pass"], row["commit_pass"]
        lines.append(
            f"{row['requests']:8} {ar['seconds'] * 1e3:8.2f} {ar['memory_bytes'] / 1e9:8.2f} "
            f"{denoiser['seconds'] * 1e3:8.2f} {denoiser['memory_bytes'] / 1e9:8.2f} "
            f"{row['experts_per_denoiser_pass']:8.1f} {commit['seconds'] * 1e3:8.2f} "
            f"{row['ar_tokens_per_second']:7.0f} {row['diffusion_tokens_per_second']:7.0f} "
            f"{row['speedup']:8.2f} {row['speedup_in_step']:8.2f}"
        )
    lines += [
        "apart: requests finish their blocks in different steps; in step: every step finishes and commits all",
        "",
        f"Diffusion is faster, apart: {_windows(plan['diffusion_faster'])}",
    ]
    if "verified" in plan:
        verified = plan["verified"]
        lines += [
            "",
            f"Verified drafts, {verified['draft_steps']} denoiser pass(es), {verified['accepted']:g} tokens accepted",
            f"{'requests':8} {'tokens/s':>9} {'/ AR':>6}",
        ]
        rows = zip(plan["loads"], verified["tokens_per_second"], verified["speedup"], strict=True)
        lines += [f"{load['requests']:8} {rate:9.0f} {speedup:6.2f}" for load, rate, speedup in rows]
        lines += ["", f"Verified is faster than AR: {_windows(verified['faster'])}"]
    if "simulated" in plan:
        lines += ["", f"Simulated tokens/s\n{'requests':8} {'AR':>8} {'diffusion':>10} {'auto':>8} {'of them AR':>11}"]
        lines += [
            f"{row['requests']:8} {row['ar_tokens_per_second']:8.0f} {row['diffusion_tokens_per_second']:10.0f} "
            f"{row['auto_tokens_per_second']:8.0f} {row['auto_ar_share']:11.0%}"
            for row in plan["simulated"]
        ]
    return "\n".join(lines)


def _windows(found: list[tuple[int, int]]) -> str:
    windows = ", ".join(f"{first} to {last}" for first, last in found)
    return f"{f'with {windows} open requests' if windows else 'never'} (of 1 to 1024)"


def _mb(count: float) -> str:
    return f"{count / 1e6:.2f} MB"
