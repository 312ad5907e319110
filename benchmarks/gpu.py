"""Everything that only a GPU can tell, in stages of a minute or two, and one table of it in the end.

    pip install -e '.[gpu,test]'
    python benchmarks/gpu.py

The stages are in ``gpu_stages.py``. Each is a process with a time limit of its own, so that one that crashes or hangs
does not end the others; what it has measured until then is kept. A stage that has ended well is not run a second time,
unless ``--again`` is given. The exit status is 1 if a stage did not end well, 2 without CUDA.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("gpu_stages.py")
DONE = "done"
LAST_WORDS = 2000
"""Characters that are kept of what a stage said when it did not end well."""


@dataclass(frozen=True)
class Stage:
    """A part of the measurements that may take ``seconds``, and what it shows."""

    name: str
    seconds: float
    what: str
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def command(self) -> list[str]:
        """The command line, without the file for the results, which comes last."""
        return [sys.executable, str(SCRIPT), self.name]


STAGES = (
    Stage("card", 30, "card, versions, memory bandwidth"),
    Stage("kernels", 60, "Triton kernels against torch"),
    Stage("goldens", 120, "NVIDIA's tokens in fp32, without and with CUDA graphs"),
    Stage("options", 60, "random options against the plain model", {"VLLM_GPU_SYNC_CHECK": "warn"}),
    Stage("passes", 150, "passes at the released layers' widths, bf16"),
    Stage("nemotron-h", 120, "vLLM's own Nemotron-H of these widths"),
    Stage("kernel-times", 60, "a denoiser pass over 64 rows by kernel"),
    Stage("fp8", 60, "weights quantised to fp8_per_channel"),
    Stage("graph-memory", 60, "memory of CUDA graphs"),
)


def main() -> None:
    """Runs the stages and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="file of all results (default: runs/gpu-CARD.json)")
    parser.add_argument("--stages", nargs="+", choices=[stage.name for stage in STAGES], help="only these")
    parser.add_argument("--again", action="store_true", help="also run stages that have ended well")
    args = parser.parse_args()
    card = name_of_card()
    if card is None:
        print("benchmarks/gpu.py needs an NVIDIA GPU: PyTorch finds no CUDA device here.", file=sys.stderr)
        raise SystemExit(2)
    stages = [stage for stage in STAGES if args.stages is None or stage.name in args.stages]
    file = args.results or Path("runs") / f"gpu-{'-'.join(card.split())}.json"
    results = run_stages(stages, file, args.again)
    print("\n".join(table(results)))
    raise SystemExit(any(results[stage.name]["status"] != DONE for stage in stages))


def name_of_card() -> str | None:
    """The GPU's name, None if PyTorch finds none; this process itself uses none."""
    import torch

    if not torch.cuda.is_available():
        return None
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.check_output(query, text=True).splitlines()[0]


def run_stages(stages: Sequence[Stage], file: Path, again: bool = False) -> dict[str, Any]:
    """Runs stages that have not ended well yet, or all of them; returns what ``file`` then holds, by stage.

    The file is written after every stage.
    """
    results = json.loads(file.read_text()) if file.exists() else {}
    for stage in stages:
        if not again and results.get(stage.name, {}).get("status") == DONE:
            print(f"{stage.name}: has been done", file=sys.stderr)
            continue
        print(f"{stage.name}: {stage.what}, up to {stage.seconds:g} s", file=sys.stderr, flush=True)
        results[stage.name] = result = run_stage(stage.command, stage.seconds, stage.environment)
        print(f"{stage.name}: {result['status']} after {result['seconds']:.0f} s", file=sys.stderr, flush=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        written = file.with_suffix(".new")
        written.write_text(json.dumps(results, indent=1))
        written.replace(file)
    return results


def run_stage(command: Sequence[str], seconds: float, environment: dict[str, str]) -> dict[str, Any]:
    """Runs a command that writes a list of rows to the file whose path it gets last.

    Returns its ``status``, ``seconds``, the ``rows`` it wrote, and its last words if the status is not ``DONE``.
    """
    with tempfile.TemporaryDirectory() as folder:
        rows, log, started = Path(folder) / "rows.json", Path(folder) / "log", time.monotonic()
        with log.open("w") as words:
            process = subprocess.Popen(
                [*command, str(rows)],
                env=os.environ | environment,
                stdout=words,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(seconds)
                status = DONE if code == 0 else f"failed with exit status {code}"
            except subprocess.TimeoutExpired:
                status = f"stopped at its limit of {seconds:g} s"
            finally:
                # What it has started too, and also when this process is interrupted.
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        result = {"status": status, "seconds": time.monotonic() - started, "date": time.strftime("%Y-%m-%d")}
        result["rows"] = json.loads(rows.read_text()) if rows.exists() else []
        if status != DONE:
            result["last_words"] = log.read_text(errors="replace")[-LAST_WORDS:]
            print(result["last_words"], file=sys.stderr)
        return result


def table(results: dict[str, Any]) -> Iterator[str]:
    """The lines of one Markdown table of all results."""
    card = results.get("card", {"rows": [], "date": "no date"})
    facts = [row["figure"] for row in card["rows"] if isinstance(row["figure"], str)]
    yield ", ".join([*facts, card["date"]])
    yield ""
    yield "| stage | measured | figure | beside it | | ratio |"
    yield "|---|---|---|---|---|---|"
    for stage in STAGES:
        if stage.name not in results:
            yield f"| {stage.name} | not run | | | | |"
            continue
        result = results[stage.name]
        for row in result["rows"]:
            if not isinstance(row["figure"], str):
                yield f"| {stage.name} | {_cells(row)} |"
        if result["status"] != DONE:
            yield f"| {stage.name} | **{result['status']}** | | | | |"


def _cells(row: dict[str, Any]) -> str:
    unit = f" {row['unit']}" if row["unit"] else ""
    cells = [row["what"], f"{row['figure']:.4g}{unit}", "", "", ""]
    if row["other"]:
        ratio = f"{row['figure'] / row['other_figure']:.2f}" if row["other_figure"] else ""
        cells[2:] = row["other"], f"{row['other_figure']:.4g}{unit}", ratio
    return " | ".join(cells)


if __name__ == "__main__":
    main()
