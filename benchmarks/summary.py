"""The one table of `make bench`: what every benchmark compared, and the ratios.

Each script appends its comparisons to the file that ``--summary`` names; this one prints them:

    python benchmarks/summary.py runs/bench.jsonl
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


class Summary:
    """Comparisons of one run of a script, appended to a file if there is one."""

    def __init__(self, file: Path | None):
        self._file = file

    @staticmethod
    def add_argument(parser: argparse.ArgumentParser) -> None:
        """The script's option."""
        parser.add_argument("--summary", type=Path, help="append comparisons to this file, for summary.py")

    def add(self, what: str, figure: float, other: str, other_figure: float, unit: str) -> None:
        """Notes that ``what`` was measured beside ``other`` in the same run."""
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            row = {"what": what, "figure": figure, "other": other, "other_figure": other_figure, "unit": unit}
            with self._file.open("a") as file:
                file.write(json.dumps(row) + "\n")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    rows = [json.loads(line) for line in parser.parse_args().file.read_text().splitlines()]
    print("| measured | | compared with | | unit | ratio |\n|---|---|---|---|---|---|")
    for row in rows:
        ratio = row["figure"] / row["other_figure"]
        figures = (f"{row[name]:.4g}" for name in ("figure", "other_figure"))
        print("| {what} | {0} | {other} | {1} | {unit} | {ratio:.2f} |".format(*figures, ratio=ratio, **row))


if __name__ == "__main__":
    main()
