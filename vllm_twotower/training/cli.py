"""The command `vllm-twotower train`: both stages, evaluation on held-out problems, export."""

import argparse
import os
from pathlib import Path

STEPS = ("train", "evaluate", "export")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("config", type=Path, help="YAML file, for example configs/train-tiny.yaml")
    parser.add_argument(
        "--only",
        choices=STEPS,
        action="append",
        help="do just this (may be repeated); by default everything. Training always goes on from a checkpoint in the "
        "configuration's run_dir; evaluation and export take the newest weights there, finished or not",
    )


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizer threads would compete with PyTorch's
    import torch

    from vllm_twotower.training.config import load_config
    from vllm_twotower.training.stages import train

    config = load_config(args.config)
    torch.set_num_threads(config.threads)
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    steps = args.only or STEPS
    if "train" in steps:
        train(config, run_dir)
    if "evaluate" in steps:
        from vllm_twotower.training.evaluate import evaluate_run

        evaluate_run(config, run_dir)
    if "export" in steps:
        from vllm_twotower.training.export import export_run

        export_run(config, run_dir)


def main() -> None:
    """`python -m vllm_twotower.training`."""
    parser = argparse.ArgumentParser(prog="vllm-twotower train", description=__doc__)
    add_arguments(parser)
    run(parser.parse_args())
