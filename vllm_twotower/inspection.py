"""Says what a checkpoint holds: pattern, sizes, both towers, missing or extra tensors, memory per GPU."""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterator
from math import prod
from pathlib import Path

from vllm_twotower.architecture import CheckpointError, TwoTowerConfig, is_of_context, tensor_shapes
from vllm_twotower.checkpoint import lacks_denoiser, read_quantization, tensor_headers
from vllm_twotower.parallel import TENSOR_PARALLEL_SIZES, tensor_parallel_obstacle
from vllm_twotower.planning.model_size import ModelSize
from vllm_twotower.quantization import EXPERT, LINEAR, Quantization

_KINDS = {"M": "Mamba-2", "*": "attention", "E": "mixture of experts", "-": "MLP"}
_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "I32": 4, "I64": 8}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("checkpoint", type=Path, help="folder with config.json and *.safetensors")
    parser.add_argument("--context-len", type=int, default=8192, help="tokens of a request, for its memory")


def run(args: argparse.Namespace) -> None:
    """Runs the command; exit status 1 if tensors are missing, extra or of another shape."""
    try:
        config = TwoTowerConfig.from_pretrained(args.checkpoint)
        found = {name: (shape, dtype) for name, shape, dtype in tensor_headers(args.checkpoint)}
        context_alone, quantization = lacks_denoiser(args.checkpoint), read_quantization(args.checkpoint)
        shapes = {name: shape for name, (shape, _) in found.items()}
        faults = layout_faults(config, shapes, context_alone, quantization)
    except (CheckpointError, OSError, ValueError) as error:
        raise SystemExit(f"vllm-twotower inspect: {error}") from None
    print("\n".join(describe(config, found, args.context_len, context_alone, quantization)))
    if faults:
        raise SystemExit("\n".join(("", "This is no complete TwoTower checkpoint:", *faults)))
    if context_alone:
        print("\nThe context tower and its head are there, and no denoiser: this serves diffusion_mode 'ar' alone.")
    else:
        print("\nEvery tensor of the TwoTower layout is there, and no other.")


def layout_faults(
    config: TwoTowerConfig,
    found: dict[str, tuple[int, ...]],
    context_alone: bool = False,
    quantization: Quantization | None = None,
) -> list[str]:
    """One line for every tensor that is missing, extra, or of another shape; the denoiser's may be missing
    with ``context_alone``."""
    wanted = tensor_shapes(config) if quantization is None else quantization.stored_shapes(tensor_shapes(config))
    missing = [name for name in wanted if name not in found and (is_of_context(name) or not context_alone)]
    faults = [f"missing: {name} {list(wanted[name] or ())}" for name in missing]
    for name, shape in found.items():
        if name not in wanted and not (quantization is not None and quantization.may_have(name)):
            faults.append(f"extra: {name} {list(shape)}")
    for name, shape in found.items():
        asked = wanted.get(name)
        if asked is not None and shape != asked:
            faults.append(f"other shape: {name} is {list(shape)}, the configuration asks for {list(asked)}")
    return faults


def describe(
    config: TwoTowerConfig,
    found: dict[str, tuple[tuple[int, ...], str]],
    context_len: int,
    context_alone: bool = False,
    quantization: Quantization | None = None,
) -> Iterator[str]:
    """The lines of the description; ``found`` has shape and dtype of every tensor."""
    layers = Counter(config.pattern)
    yield f"Pattern     {config.pattern}"
    counts = ", ".join(f"{layers[kind]} {name}" for kind, name in _KINDS.items() if layers[kind])
    yield f"            {len(config.pattern)} layers: {counts}"
    yield f"Sizes       hidden {config.hidden_size}, vocabulary {config.vocab_size}"
    if layers["*"]:
        yield (
            f"            attention: {config.num_attention_heads} heads of {config.head_dim}, "
            f"{config.num_key_value_heads} for keys and values"
        )
    if layers["M"]:
        yield (
            f"            Mamba-2: {config.mamba_num_heads} heads of {config.mamba_head_dim} in {config.n_groups} "
            f"groups, state size {config.ssm_state_size}"
        )
    if layers["E"]:
        yield (
            f"            experts: {config.n_routed_experts} of {config.moe_intermediate_size}, "
            f"{config.num_experts_per_tok} a token, shared {config.moe_shared_expert_intermediate_size}"
        )
    yield f"Block       {config.canvas_length} positions, mask token {config.mask_token_id}"
    parts: dict[str, float] = defaultdict(float)
    plain = found if quantization is None else {name: (shape,) for name, shape in tensor_shapes(config).items()}
    for name, (shape, *_) in plain.items():
        parts[_part(name, context_alone)] += prod(shape)
    for i, (part, parameters) in enumerate(sorted(parts.items())):
        yield f"{'' if i else 'Parameters':12}{part}: {_count(parameters)}"
    dtypes = Counter(dtype for _, dtype in found.values())
    yield f"Dtypes      {', '.join(f'{dtype} ({count} tensors)' for dtype, count in dtypes.most_common())}"
    if quantization is not None:
        yield from _quantized(config, found, context_len, context_alone, quantization)
        return
    dtype_bytes = _BYTES.get(dtypes.most_common(1)[0][0], 2) if dtypes else 2
    yield f"Memory      per GPU; a request of {context_len} tokens"
    for tensor_parallel_size in TENSOR_PARALLEL_SIZES:
        if obstacle := tensor_parallel_obstacle(config, tensor_parallel_size):
            yield f"            TP {tensor_parallel_size}: not possible, {obstacle}"
            continue
        size = ModelSize.of(config, tensor_parallel_size, dtype_bytes, dtype_bytes, 4)
        weights = "" if context_alone else f"weights {_bytes(size.weight_bytes)}, "
        weights += f"context tower alone {_bytes(size.tower_bytes)}, request {_bytes(size.request_bytes(context_len))}"
        yield f"            TP {tensor_parallel_size}: {weights}"


def _quantized(
    config: TwoTowerConfig,
    found: dict[str, tuple[tuple[int, ...], str]],
    context_len: int,
    context_alone: bool,
    quantization: Quantization,
) -> Iterator[str]:
    """The schemes of a quantised checkpoint's parts, and its memory as it is stored."""
    schemes: Counter[tuple[str, str]] = Counter()
    for name, shape in tensor_shapes(config).items():
        module, _, kind = name.rpartition(".")
        if kind == "weight" and len(shape) == 2 and LINEAR.fullmatch(module):
            what = "experts" if EXPERT.fullmatch(module) else "other matrices"
            schemes[f"{_part(name, context_alone)}, {what}", quantization.scheme_name(module) or "as they are"] += 1
    for i, ((part, scheme), count) in enumerate(sorted(schemes.items())):
        yield f"{'' if i else 'Schemes':12}{part}: {scheme} ({count})"
    stored: dict[str, float] = defaultdict(float)
    for name, (shape, dtype) in found.items():
        stored[_part(name, context_alone)] += prod(shape) * _BYTES.get(dtype, 2)
    for i, (part, size) in enumerate(sorted(stored.items())):
        yield f"{'' if i else 'Memory':12}{part}: {_bytes(size)} as stored"
    request = ModelSize.of(config, 1, 2, 2, 4).request_bytes(context_len)
    yield f"            a request of {context_len} tokens in bf16: {_bytes(request)}"


def _part(name: str, context_alone: bool) -> str:
    if context_alone and not is_of_context(name):
        return "left of the denoiser, not loaded"
    for prefix, part in (
        ("context_", "context tower and head"),
        ("denoiser_tower.", "denoiser tower and head"),
        ("lm_head.", "denoiser tower and head"),
        ("t_", "time conditioning"),
        ("scale_shift_tables.", "time conditioning"),
    ):
        if name.startswith(prefix):
            return part
    return "others"


def _count(number: float) -> str:
    return f"{number / 1e9:.3f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _bytes(number: float) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.2f} MiB"
