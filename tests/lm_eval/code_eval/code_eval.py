"""The metric that `evaluate` otherwise downloads under this name: pass@k of programs, which it runs."""

import math
import os
import subprocess
import sys

import datasets
import evaluate

SECONDS = 10


def passes(program: str) -> bool:
    """Whether a program ends without an error, in a process of its own."""
    command = [sys.executable, "-I", "-c", program]
    try:
        return subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=SECONDS).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def pass_at(k: int, right: int, tried: int) -> float:
    """The chance that one of k programs is right, drawn from those that were tried."""
    return 1 - math.comb(tried - right, k) / math.comb(tried, k)


class CodeEval(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        features = datasets.Features({"predictions": datasets.List(text), "references": text})
        return evaluate.MetricInfo(description=__doc__, citation="", features=features)

    def _compute(self, predictions, references, k=(1,)):
        if os.getenv("HF_ALLOW_CODE_EVAL") != "1":
            raise ValueError("programs are only run with HF_ALLOW_CODE_EVAL=1")
        results = [
            [passes(f"{program}\n{tests}") for program in programs]
            for programs, tests in zip(predictions, references, strict=True)
        ]
        scores = {f"pass@{i}": sum(pass_at(i, sum(r), len(r)) for r in results) / len(results) for i in k}
        return scores, results
