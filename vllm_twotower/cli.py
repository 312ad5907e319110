"""The ``vllm-twotower`` command; serving is ``vllm serve`` itself."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from vllm_twotower import __version__

COMMANDS = {
    "demo": ("generate with the tiny model, by mask diffusion and token by token", "demo"),
    "init": ("make a TwoTower checkpoint from a Nemotron-H one", "conversion"),
    "inspect": ("say what a checkpoint holds, and the memory it needs", "inspection"),
    "model-path": ("print the folder of the embedded model, which `vllm serve` takes", "model_path"),
    "plan": ("predict speed and memory on given hardware", "planning.cli"),
    "quantize": ("quantise a checkpoint's experts, or all its matrices", "quantize"),
    "eval": ("accuracy and speed on held-out problems, sweeps, likelihoods", "evaluation.cli"),
    "experiment": ("sweeps and ablations from a YAML file, with plots", "experiments.cli"),
    "ray-up": ("start a local Ray cluster for tensor parallelism on CPUs", "ray_cluster"),
    "watch": ("show blocks being filled: in the terminal, on a page, as a moving picture", "watch.cli"),
    "train": ("train a TwoTower from a YAML file", "training.cli"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one sub-command, a module with ``add_arguments(parser)`` and ``run(args)``; no other one is imported."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="vllm-twotower", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, (help_text, module_name) in COMMANDS.items():
        command = commands.add_parser(name, help=help_text)
        if name in argv:
            module = import_module(f"vllm_twotower.{module_name}")
            command.description = module.__doc__
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
