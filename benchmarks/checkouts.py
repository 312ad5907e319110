"""Tokens per second of processor time of two checkouts of this project, whose engines take turns.

    git worktree add ../old HEAD~1
    python benchmarks/checkouts.py ../old . --open 1 4 16 64

Both engines run in one process each, on one thread; every round asks both for the same texts, one after the other, and
the figure that counts is the median of the rounds' ratios. So it holds on a machine whose speed changes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from closed_loop import TINY, problems, start

ENGINE = "--engine"


def use_patches_of(folder: Path) -> None:
    """Makes a checkout's ``patches`` the package's: an installed package would have those of another one."""
    name, path = "vllm_twotower.patches", folder / "patches"
    spec = spec_from_file_location(name, path / "__init__.py", submodule_search_locations=[str(path)])
    sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


def serve(model: Path) -> None:
    """Answers each line of the input, a number of requests and a mode, with tokens per second of processor time."""
    use_patches_of(Path.cwd())
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # all in this process
    from vllm import SamplingParams

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    llm = start(model, {}, max_num_seqs=64)
    prompts = [problem["prompt"] for problem in problems(model)]
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        count, mode, max_tokens = json.loads(line)
        params = SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, extra_args={"diffusion_mode": mode}
        )
        started = time.process_time()
        llm.generate(prompts[:count], params, use_tqdm=False)
        print(count * max_tokens / (time.process_time() - started), file=answers, flush=True)


class Checkout:
    """The engine of a checkout, in a process of its own."""

    def __init__(self, folder: Path, model: Path):
        environment = os.environ | {"PYTHONPATH": str(folder.resolve())}
        command = [sys.executable, __file__, ENGINE, str(model)]
        self._process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def wait(self) -> None:
        """Until it can be asked."""
        if self._process.stdout.readline() != "ready\n":
            sys.exit("an engine did not start")

    def ask(self, count: int, mode: str, max_tokens: int) -> float:
        self._process.stdin.write(json.dumps((count, mode, max_tokens)) + "\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())


def main() -> None:
    """Measures and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--model", type=Path, default=TINY)
    parser.add_argument("--open", type=int, nargs="+", default=[1, 4, 16, 64], help="requests at a time")
    parser.add_argument("--modes", nargs="+", default=["ar", "mask_diffusion"])
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    old, new = (Checkout(folder, args.model.resolve()) for folder in (args.old, args.new))
    old.wait()
    new.wait()
    print("| requests | mode | old, tokens/s | new, tokens/s | new / old |\n|---|---|---|---|---|")
    for count in args.open:
        for mode in args.modes:
            asked = (count, mode, args.max_tokens)
            for engine in (old, new):
                engine.ask(*asked)
            rates = []
            for i in range(args.rounds):
                turns = (old, new) if i % 2 else (new, old)
                of_turn = {engine: engine.ask(*asked) for engine in turns}
                rates.append((of_turn[old], of_turn[new]))
            figures = [statistics.median(of_engine) for of_engine in zip(*rates, strict=True)]
            ratio = statistics.median(after / before for before, after in rates)
            print(f"| {count} | {mode} | {figures[0]:.0f} | {figures[1]:.0f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == [ENGINE]:
        serve(Path(sys.argv[2]))
    else:
        main()
