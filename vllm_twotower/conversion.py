"""Makes a TwoTower checkpoint from a Nemotron-H one: both towers and both heads are copies of it.

The time conditioning starts as nothing (shift 0, scale 0, gate 1 at every t), so the new denoiser is the autoregressive
tower and is yet to be trained. The checkpoint is streamed a shard at a time.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vllm_twotower.architecture import (
    ARCHITECTURE,
    DEFAULT_MASK_TOKEN_ID,
    CheckpointError,
    TwoTowerConfig,
    layer_pattern,
    tensor_shapes,
)
from vllm_twotower.checkpoint import INDEX, WeightCheck, tensor_headers
from vllm_twotower.progress import progress

_TOWER = re.compile(r"^(?:backbone|model)\.(?=embeddings\.|layers\.|norm_f\.)")
_STACKED = re.compile(r"(.*\.mixer\.experts)\.(up_proj|down_proj)")
_TIME_STD = 0.02  # of the time embedding, which acts once training has moved the projection behind it from zero


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("source", type=Path, help="folder of a Nemotron-H checkpoint (config.json, *.safetensors)")
    parser.add_argument("target", type=Path, help="folder to write; must not exist or be empty")
    parser.add_argument("--mask-token-id", type=int, help="token that stands for a masked position (default: 3)")
    parser.add_argument("--canvas-length", type=int, help="positions of a block (default: 16)")
    parser.add_argument("--seed", type=int, default=0, help="of the time embedding's random start")


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    options = {"mask_token_id": args.mask_token_id, "canvas_length": args.canvas_length}
    try:
        config = make_two_tower(args.source, args.target, options, args.seed)
    except CheckpointError as error:
        raise SystemExit(f"vllm-twotower init: {error}") from None
    print(
        f"{args.target}: both towers are {args.source} ({config.pattern}). The time conditioning is neutral (shift 0, "
        "scale 0, gate 1), so the denoiser starts as the autoregressive tower: train it before using mask diffusion."
    )


def make_two_tower(
    source: Path, target: Path, options: Mapping[str, int | None] | None = None, seed: int = 0
) -> TwoTowerConfig:
    """Writes the TwoTower checkpoint ``target``, holding no more than a shard of ``source`` in memory.

    ``options`` may set ``mask_token_id`` and ``canvas_length``. Raises CheckpointError for what is no Nemotron-H, has
    features no TwoTower has, lacks tensors or has others; then nothing is left of ``target``.
    """
    files = sorted(source.glob("*.safetensors"))
    if not files or not (source / "config.json").is_file():
        raise CheckpointError(f"{source} needs a config.json and at least one *.safetensors file")
    if target.exists() and any(target.iterdir()):
        raise CheckpointError(f"{target} is not empty")
    content = two_tower_config(json.loads((source / "config.json").read_text()), options or {})
    config = TwoTowerConfig.from_dict(content)
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_shards(files, partial, config, seed)
        (partial / "config.json").write_text(json.dumps(content, indent=2) + "\n")
        for file in source.iterdir():
            is_weight = file.suffix in (".safetensors", ".bin") or file.name.endswith(".index.json")
            if file.is_file() and not is_weight and file.name != "config.json":
                shutil.copy(file, partial)
        if target.exists():
            target.rmdir()
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return config


def two_tower_config(source: Mapping[str, Any], options: Mapping[str, int | None]) -> dict[str, Any]:
    """The ``config.json`` of a TwoTower from that of a Nemotron-H; raises CheckpointError."""
    if source.get("model_type") != "nemotron_h":
        raise CheckpointError(f"model_type is {source.get('model_type')!r}: expected 'nemotron_h'")
    if ARCHITECTURE in (source.get("architectures") or []):
        raise CheckpointError("the source is a TwoTower checkpoint already")
    if source.get("moe_latent_size"):
        raise CheckpointError(f"moe_latent_size is {source['moe_latent_size']}: no TwoTower has latent experts")
    content = {name: value for name, value in source.items() if name not in ("auto_map", "transformers_version")}
    content["hybrid_override_pattern"] = layer_pattern(content)
    content |= {"architectures": [ARCHITECTURE], "tie_word_embeddings": False, "num_nextn_predict_layers": 0}
    for name, value in options.items():
        if value is not None:
            content[name] = value
    mask = content.get("mask_token_id", DEFAULT_MASK_TOKEN_ID)
    if not 0 <= mask < content["vocab_size"]:
        raise CheckpointError(f"mask_token_id is {mask}: it must be within 0 and {content['vocab_size'] - 1}")
    if content.get("canvas_length", 1) < 1:
        raise CheckpointError(f"canvas_length is {content['canvas_length']}: it must be at least 1")
    return content


def _write_shards(files: list[Path], folder: Path, config: TwoTowerConfig, seed: int) -> None:
    """Two shards for each of the source's, one a tower, and one with the time conditioning."""
    check, weight_map, total, count = WeightCheck(config), {}, 0, 2 * len(files) + 1
    towers = (("context_tower.", "context_lm_head."), ("denoiser_tower.", "lm_head."))
    tied_head = not any(name == "lm_head.weight" for name, _, _ in tensor_headers(files[0].parent))
    dtype = torch.bfloat16

    def write(number: int, tensors: dict[str, Tensor]) -> None:
        nonlocal total
        name = f"model-{number:05}-of-{count:05}.safetensors"
        for key, tensor in tensors.items():
            check.see_shape(key, tuple(tensor.shape))
            weight_map[key] = name
            total += tensor.nbytes
        save_file(tensors, folder / name, {"format": "pt"})

    for index, file in enumerate(progress(files, "converting", "shards")):
        tensors = dict(_tower_tensors(file, tied_head))
        if "embeddings.weight" in tensors:
            dtype = tensors["embeddings.weight"].dtype
        for offset, (tower, head) in enumerate(towers):
            renamed = {
                (key.replace("lm_head.", head, 1) if key.startswith("lm_head.") else tower + key): tensor
                for key, tensor in tensors.items()
            }
            write(2 * index + offset + 1, renamed)
    write(count, neutral_time_conditioning(config, dtype, seed))
    check.finish()
    index_content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index_content, indent=2) + "\n")


def _tower_tensors(file: Path, tied_head: bool) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a shard under their names within a tower, experts one by one; ``lm_head.weight`` as it is.

    Heads that predict more than one token ahead (``mtp``) are left out.
    """
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
            if name.startswith("mtp."):
                continue
            tensor, inner = tensors.get_tensor(name), _TOWER.sub("", name)
            if stacked := _STACKED.fullmatch(inner):
                prefix, projection = stacked.groups()
                yield from ((f"{prefix}.{i}.{projection}.weight", one.clone()) for i, one in enumerate(tensor))
                continue
            yield inner, tensor
            if tied_head and inner == "embeddings.weight":
                yield "lm_head.weight", tensor.clone()


def neutral_time_conditioning(config: TwoTowerConfig, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Shift 0, scale 0 and gate 1 in every layer whatever t is; the embedding of t is random."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, shape in tensor_shapes(config).items():
        if name.startswith("t_embedder.") and name.endswith(".weight"):
            tensors[name] = (torch.randn(shape, generator=generator) * _TIME_STD).to(dtype)
        elif name.startswith(("t_embedder.", "t_block.", "scale_shift_tables.")):
            tensors[name] = torch.zeros(shape, dtype=dtype)
        if name.startswith("scale_shift_tables."):
            tensors[name][2] = 1
    return tensors
