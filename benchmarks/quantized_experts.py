"""A layer of experts on a CPU by the scheme of its weights: time, and bytes read.

    python benchmarks/quantized_experts.py --experts 64 --hidden 2688 --width 1856 --tokens 1 16

Tokens choose six of the experts each; those of one run agree in as many as the released model's tokens of a canvas do,
34 distinct ones for sixteen. The schemes take turns, and the figure that counts is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_twotower.model.quantized_cpu import QuantizedProjection, kept_tensors
from vllm_twotower.quantization import quantization_of
from vllm_twotower.quantize import Recipe, compressed

SCHEMES = ("bf16", "int8", "int4")
DISTINCT = {1: 6, 16: 34}
"""Distinct experts of six a token, measured on the released model (junze-eng/twotower-repro)."""


def projection(scheme: str, out_size: int, in_size: int) -> nn.Module | Tensor:
    """A matrix of random weights."""
    weight = torch.randn(out_size, in_size, dtype=torch.bfloat16) / in_size**0.5
    if scheme == "bf16":
        return weight
    config = Recipe(scheme).config()
    [of_experts] = config.config_groups.values()
    quantization, name = quantization_of(config.model_dump()), "a.experts.0.up_proj"
    groups = in_size // of_experts.weights.group_size if scheme == "int4" else 1
    made = QuantizedProjection((out_size, in_size), of_experts.weights, groups, 0)
    for part, value in kept_tensors(quantization, name, compressed(weight, of_experts)).items():
        parameter = getattr(made, part)
        parameter.weight_loader(parameter, value)
    return made


def layer(scheme: str, args: argparse.Namespace) -> tuple[Callable[[list[Tensor]], None], int]:
    """Runs parts of a pass through experts, one after the other; and the bytes of one expert."""
    experts = [
        (projection(scheme, args.width, args.hidden), projection(scheme, args.hidden, args.width))
        for _ in range(args.experts)
    ]

    def apply(matrix: nn.Module | Tensor, x: Tensor) -> Tensor:
        return F.linear(x, matrix) if isinstance(matrix, Tensor) else matrix(x)

    def run(parts: list[Tensor]) -> None:
        for (up, down), part in zip(experts, parts, strict=False):
            apply(down, F.relu(apply(up, part)).square_())

    one = sum(
        sum(tensor.nbytes for tensor in ([matrix] if isinstance(matrix, Tensor) else matrix.parameters()))
        for matrix in experts[0]
    )
    return run, one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=2688)
    parser.add_argument("--width", type=int, default=1856)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16], choices=DISTINCT)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_default_dtype(torch.bfloat16)
    layers = {scheme: layer(scheme, args) for scheme in SCHEMES}
    print("| tokens | weights | ms | bf16 / this | MB read |")
    print("|---|---|---|---|---|")
    for tokens in args.tokens:
        count = min(args.experts, DISTINCT[tokens])
        sizes = [len(part) for part in torch.arange(6 * tokens).chunk(count)]
        parts = [torch.randn(size, args.hidden) for size in sizes]
        rounds = []
        for _ in range(args.rounds):
            seconds = {}
            for scheme, (run, _) in layers.items():
                start = time.perf_counter()
                run(parts)
                seconds[scheme] = time.perf_counter() - start
            rounds.append(seconds)
        for scheme, (_, one) in layers.items():
            milliseconds = 1e3 * statistics.median(seconds[scheme] for seconds in rounds)
            ratio = statistics.median(seconds["bf16"] / seconds[scheme] for seconds in rounds)
            print(f"| {tokens} | {scheme} | {milliseconds:.1f} | {ratio:.2f} | {len(parts) * one / 1e6:.0f} |")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
