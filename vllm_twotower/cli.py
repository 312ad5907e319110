"""The ``vllm-twotower`` command."""

import argparse
from collections.abc import Sequence

from vllm_twotower import __version__


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="vllm-twotower", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    parser.parse_args(argv)


if __name__ == "__main__":
    main()
