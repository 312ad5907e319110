"""Trains a TwoTower and exports it as a model folder.

On several processes: torchrun --nproc-per-node 2 -m vllm_twotower.training CONFIG, or --ray 2.
"""

import argparse
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

STEPS = ("train", "export")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--ray", type=int, metavar="N", help="train on N workers of Ray Train")
    parser.add_argument("config", type=Path, help="YAML file, for example configs/train-tiny.yaml")
    parser.add_argument(
        "--only",
        choices=STEPS,
        action="append",
        help="do just this (may be repeated); by default everything. Training always goes on from a checkpoint in the "
        "configuration's run_dir; export takes the newest weights there, finished or not",
    )


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    if args.ray:
        from vllm_twotower.training.distributed import run_on_ray

        run_on_ray(partial(run_here, args.config, args.only), args.ray)
    else:
        run_here(args.config, args.only)


def run_here(path: Path, only: list[str] | None) -> None:
    """Runs the command in this process, which may be one of several."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizer threads would compete with PyTorch's
    import torch

    from vllm_twotower.training.attention import block_attention
    from vllm_twotower.training.config import TrainConfigError, load_config
    from vllm_twotower.training.distributed import device, has_bf16, process_group, rank
    from vllm_twotower.training.stages import train

    steps = only or STEPS
    try:
        config = load_config(path)
        if "train" in steps:
            if config.bf16_autocast and not has_bf16():
                print(
                    "bf16_autocast is true, but this device has no bf16 arithmetic: training in fp32", file=sys.stderr
                )
                config = replace(config, bf16_autocast=False)
            block_attention(config, device())  # before the first stage, which does without
    except TrainConfigError as error:
        raise SystemExit(f"vllm-twotower train: {path}: {error}") from None
    torch.set_num_threads(config.threads)
    if torch.cuda.is_available() and config.bf16_autocast:
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    with process_group():
        if "train" in steps:
            train(config, run_dir)
        is_first = rank() == 0
    if "export" in steps and is_first:
        from vllm_twotower.training.export import export_run

        export_run(config, run_dir)


def main() -> None:
    """`python -m vllm_twotower.training`."""
    parser = argparse.ArgumentParser(prog="vllm-twotower train", description=__doc__)
    add_arguments(parser)
    run(parser.parse_args())
