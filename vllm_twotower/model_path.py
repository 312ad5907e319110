"""``vllm-twotower model-path``: prints the folder of the embedded model."""

from __future__ import annotations

import argparse

from vllm_twotower.models import embedded_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command has no arguments."""


def run(args: argparse.Namespace) -> None:
    """Runs the command: prints the folder."""
    print(embedded_model())
