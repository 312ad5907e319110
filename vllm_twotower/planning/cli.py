"""The command `vllm-twotower plan`: step times, tokens/s and memory of all modes on given hardware, from formulas."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_twotower.arguments import number, whole_number
from vllm_twotower.parallel import TENSOR_PARALLEL_SIZES, check_tensor_parallel_size, tensor_parallel_obstacle

from .accepted_tokens import AcceptedTokens, expected_accepted
from .calibration import calibration_data, calibration_table
from .cost_model import CostModel, Load
from .hardware import DEVICES, Hardware
from .model_size import WEIGHT_BYTES
from .recommendation import Question, recommend
from .released import RELEASED_CONFIG
from .steps_per_block import StepsPerBlock
from .texts import MEAN_PASSES, steps_of_text

if TYPE_CHECKING:
    from vllm_twotower.architecture import TwoTowerConfig

DTYPES = ("bfloat16", "float16", "float32")
STATE_DTYPES = ("float32", "bfloat16", "float16")


def _not_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 on")
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
    if cache_dtype not in STATE_DTYPES:
        raise argparse.ArgumentTypeError(
            f"{text!r}: its mamba_ssm_cache_dtype is {cache_dtype!r}, known are {', '.join(STATE_DTYPES)}"
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


def _threshold(text: str) -> float:
    value = number(text)
    try:
        steps_of_text("open", value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add = parser.add_argument
    add("--model", type=_model, default="released", help="checkpoint folder, or 'released' (default) for NVIDIA's 30B")
    add("--recommend", type=whole_number, metavar="OPEN", help="say in words how to serve so many open requests")
    add("--calibration", action="store_true", help="compare the formulas with the times that others have published")
    add("--text", choices=MEAN_PASSES, default="open", help="kind of text, which decides the denoiser passes a block "
        "takes: arithmetic problems, their answers alone, HumanEval, open prompts (default)")  # fmt: skip
    add("--threshold", type=_threshold, default=0.8, metavar="0.5...0.95", help="diffusion_confidence_threshold "
        "(default: 0.8)")  # fmt: skip
    add("--steps-per-block", type=_steps_per_block, metavar="MEAN|FILE", help="denoiser passes a block takes, instead "
        "of those of --text: a mean, or what a server's /metrics returned")  # fmt: skip
    add("--accepted", type=_not_negative, metavar="TOKENS", help="of a draft in mode verified, on average (default: as "
        "many as a denoiser pass commits)")  # fmt: skip
    add("--draft-steps", type=whole_number, default=1, metavar="N", help="denoiser passes of a draft (default: 1)")
    add("--batch-sizes", type=whole_number, nargs="+", default=[1, 8, 16, 32, 64, 128, 256, 512], metavar="N",
        help="numbers of open requests (default: 1 8 16 ... 512)")  # fmt: skip
    add("--context", type=whole_number, default=1024, metavar="TOKENS", help="of each request (default: %(default)s)")
    add("--prompt-tokens", type=whole_number, default=0, metavar="N", help="of a new prompt that is read for every "
        "--output-tokens tokens (default: no request ends)")  # fmt: skip
    add(
        "--output-tokens",
        type=whole_number,
        default=inf,
        metavar="N",
        help="that a request generates (default: no end)",
    )
    _add_hardware(parser)


def _add_hardware(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--hardware", choices=DEVICES, default="H200", help="a known card (default: %(default)s)")
    add(
        "--tensor-parallel-size",
        type=whole_number,
        default=1,
        metavar="N",
        help="cards that share a model (default: 1)",
    )
    add("--dtype", choices=DTYPES, default="bfloat16", help="of activations, KV cache and weights (default: bfloat16)")
    add("--experts-dtype", choices=WEIGHT_BYTES, help="of the weights of routed experts, if another")
    add("--linear-dtype", choices=WEIGHT_BYTES, help="of the weights of other layers, if another; not of embeddings "
        "and head")  # fmt: skip
    add("--bandwidth", type=number, metavar="GB/S", help="memory bandwidth, instead of the card's")
    add("--flops", type=number, metavar="TFLOP/S", help="rate of dense matrix products, instead of the card's")
    add("--memory", type=number, metavar="GB", help="memory of a card, instead of its own")
    add("--link-bandwidth", type=number, metavar="GB/S", help="between cards, one direction, instead of the card's")
    add("--step-overhead", type=_not_negative, metavar="MS", default=0.0, help="of an engine step (default: 0)")
    add("--pass-overhead", type=_not_negative, metavar="MS", default=0.0, help="of a tower pass (default: 0)")
    add("--json", action="store_true", help="print JSON instead of text; seconds, bytes, FLOP")


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from vllm_twotower.architecture import CheckpointError, TwoTowerConfig

    if args.prompt_tokens and args.output_tokens == inf:
        raise SystemExit(
            f"vllm-twotower plan: error: argument --prompt-tokens: {args.prompt_tokens} are read for every "
            "--output-tokens generated: give both"
        )
    try:
        config = TwoTowerConfig.from_dict(args.model)
        answer: dict[str, Any] | list[dict[str, Any]]
        if args.calibration:
            answer, as_words = calibration_data(config), calibration_table(config)
        elif args.recommend:
            answer = make_recommendation(config, args)
            as_words = answer["text"]
        else:
            answer = make_plan(config, args)
            as_words = as_text(answer)
    except CheckpointError as error:
        raise SystemExit(f"vllm-twotower plan: error: argument --model: {error}") from None
    except ValueError as error:
        name = "accepted" if "accepted tokens" in str(error) else "tensor-parallel-size"
        raise SystemExit(f"vllm-twotower plan: error: argument --{name}: {error}") from None
    print(json.dumps(answer, indent=2) if args.json else as_words)


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


def _models(config: TwoTowerConfig, args: argparse.Namespace) -> Callable[[int], CostModel]:
    """The cost model by tensor parallel size."""
    return lambda size: CostModel(
        config,
        _hardware(args),
        tensor_parallel_size=size,
        dtype=args.dtype,
        linear_dtype=args.linear_dtype,
        experts_dtype=args.experts_dtype,
        ssm_dtype=args.model.get("mamba_ssm_cache_dtype", "float32"),
    )


def _load(config: TwoTowerConfig, args: argparse.Namespace) -> Load:
    steps, most = args.steps_per_block or steps_of_text(args.text, args.threshold), config.canvas_length - 1
    accepted = expected_accepted(steps, most) if args.accepted is None else AcceptedTokens.of_mean(args.accepted, most)
    return Load(1, args.context, steps, args.prompt_tokens, args.output_tokens, args.draft_steps, accepted)


def make_recommendation(config: TwoTowerConfig, args: argparse.Namespace) -> dict[str, Any]:
    """What ``--recommend`` says, as plain data."""
    check_tensor_parallel_size(config, args.tensor_parallel_size)
    sizes = [size for size in TENSOR_PARALLEL_SIZES if size >= args.tensor_parallel_size]
    possible = [size for size in sizes if not tensor_parallel_obstacle(config, size)] or [args.tensor_parallel_size]
    text = "given" if args.steps_per_block else args.text
    question = Question(
        args.hardware, args.recommend, _load(config, args), text, args.threshold, args.experts_dtype, args.linear_dtype
    )
    return recommend(question, _models(config, args), possible)


def make_plan(config: TwoTowerConfig, args: argparse.Namespace) -> dict[str, Any]:
    """The whole answer as plain data in seconds, bytes, FLOP; raises ValueError if the model cannot be divided so."""
    check_tensor_parallel_size(config, args.tensor_parallel_size)
    model_with, load = _models(config, args), _load(config, args)
    model = model_with(args.tensor_parallel_size)
    return {
        "hardware": asdict(model.hardware),
        "tensor_parallel_size": args.tensor_parallel_size,
        "context": args.context,
        "passes_per_block": load.steps_per_block.mean,
        "accepted": load.accepted.mean,
        "draft_steps": args.draft_steps,
        "memory": [_memory(config, model_with, size, args.context) for size in TENSOR_PARALLEL_SIZES],
        "request": {
            "state_bytes": model.size.state_bytes,
            "kv_bytes_per_token": model.size.kv_bytes_per_token,
            "bytes": model.size.request_bytes(args.context),
        },
        "loads": [_at_load(model, load._replace(num_open=batch)) for batch in args.batch_sizes],
        "faster_than_ar": {mode: model.crossovers(load, mode=mode) for mode in ("mask_diffusion", "verified")},
    }


def _memory(config: TwoTowerConfig, model_with: Callable[[int], CostModel], size: int, context: int) -> dict[str, Any]:
    if obstacle := tensor_parallel_obstacle(config, size):
        return {"tensor_parallel_size": size, "impossible": obstacle}
    model = model_with(size)
    return {
        "tensor_parallel_size": size,
        "weight_bytes": model.size.weight_bytes,
        "request_bytes": model.size.request_bytes(context),
        "max_requests": model.max_requests(context),
    }


def _at_load(model: CostModel, load: Load) -> dict[str, Any]:
    batch, context = load.num_open, load.context_len
    passes = {
        "ar": model.ar_pass(batch, context),
        "denoiser": model.denoiser_pass(batch, context),
        "commit": model.commit_pass(batch, context),
    }
    speeds = {mode: model.tokens_per_second(mode, load) for mode in ("ar", "mask_diffusion", "verified")}
    return {
        "requests": batch,
        **{f"{name}_pass": {**cost._asdict(), "memory_bytes": cost.memory_bytes} for name, cost in passes.items()},
        "experts_per_denoiser_pass": model.experts_touched(batch, batch * model.canvas_length),
        "tokens_per_second": speeds,
        "over_ar": {mode: speed / speeds["ar"] for mode, speed in speeds.items() if mode != "ar"},
    }


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
            fits = f"{row['max_requests']:,}" if row["max_requests"] else "does not fit"
            lines.append(f"{size}  {row['weight_bytes'] / 1e9:20.2f}  {fits:>17}")
    lines += ["", *_load_lines(plan), ""]
    for mode, found in plan["faster_than_ar"].items():
        windows = ", ".join(f"{first} to {last}" for first, last in found)
        lines.append(f"{mode} is faster than ar: {f'with {windows} open' if windows else 'never'} (of 1 to 1024)")
    return "\n".join(lines)


def _load_lines(plan: dict[str, Any]) -> list[str]:
    lines = [
        f"{plan['tensor_parallel_size']} GPU(s), {plan['passes_per_block']:.2f} denoiser passes a block; verified: "
        f"{plan['accepted']:.2f} tokens accepted of a draft made in {plan['draft_steps']} pass(es)",
        f"{'':8} {'AR step':>17} {'denoiser pass':>26} {'commit':>8} {'tokens/s':>26} {'/ AR':>17}",
        f"{'requests':8} {'ms':>8} {'GB':>8} {'ms':>8} {'GB':>8} {'experts':>8} {'ms':>8} {'AR':>8} {'diff.':>8} "
        f"{'verified':>8} {'diff.':>8} {'verified':>8}",
    ]
    for row in plan["loads"]:
        ar, denoiser, commit = row["ar_pass"], row["denoiser_pass"], row["commit_pass"]
        speeds = " ".join(f"{speed:8,.0f}" for speed in row["tokens_per_second"].values())
        ratios = " ".join(f"{ratio:8.2f}" for ratio in row["over_ar"].values())
        lines.append(
            f"{row['requests']:8} {ar['seconds'] * 1e3:8.2f} {ar['memory_bytes'] / 1e9:8.2f} "
            f"{denoiser['seconds'] * 1e3:8.2f} {denoiser['memory_bytes'] / 1e9:8.2f} "
            f"{row['experts_per_denoiser_pass']:8.1f} {commit['seconds'] * 1e3:8.2f} {speeds} {ratios}"
        )
    return lines


def _mb(count: float) -> str:
    return f"{count / 1e6:.2f} MB"
