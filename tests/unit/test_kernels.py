"""The Triton kernels without a GPU: their results in Triton's interpreter, and what they compile to."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import kernel_cases
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, compile
from triton.runtime.jit import JITFunction

from vllm_twotower.kernels.on_gpu import modulated_norm, random_numbers, seeded_mamba, unmasking, vocabulary

ARCHITECTURES = (80, 90, 100, 120)
MODULES = {
    "conv": seeded_mamba,
    "scan": seeded_mamba,
    "commit": seeded_mamba,
    "norm": modulated_norm,
    "statistics": vocabulary,
    "draw": vocabulary,
    "uniform": random_numbers,
    "unmask": unmasking,
}
TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
SHARED_MEMORY = 48 << 10
"""Bytes a program may have on every card without asking."""
REGISTERS = 65536


@pytest.fixture(scope="module")
def errors() -> dict[str, list[float]]:
    script = Path(kernel_cases.__file__)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("kernel", kernel_cases.CASES)
def test_equals_torch(errors: dict[str, list[float]], kernel: str) -> None:
    for (_, arguments), error in zip(kernel_cases.CASES[kernel], errors[kernel], strict=True):
        # In bf16 an ulp more or less; states depend on differences of long sums.
        rounding = 2e-2 if kernel in ("norm", "scan") and "dtype" in arguments else 1e-5
        assert error < (1e-4 if kernel == "commit" else rounding), arguments


class Launches:
    """In the place of a kernel: notes what it is launched with."""

    def __init__(self, kernel: JITFunction):
        self.kernel, self.seen = kernel, []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.seen.append((args, kwargs))

        return launch

    def compiled(self, architecture: int) -> Iterator[tuple[CompiledKernel, int]]:
        """Each launch compiled for an architecture, with its number of threads."""
        for args, kwargs in self.seen:
            warps = kwargs.get("num_warps", 4)
            constants = {name: value for name, value in kwargs.items() if name != "num_warps"}
            signature = dict(zip(self.kernel.arg_names, map(type_of, args), strict=False))
            constants |= {name: None for name, kind in signature.items() if kind == "constexpr"}
            signature |= dict.fromkeys(constants, "constexpr")
            signature = {name: signature[name] for name in self.kernel.arg_names}
            places = {(self.kernel.arg_names.index(name),): value for name, value in constants.items()}
            source = ASTSource(self.kernel, signature, places)
            yield compile(source, GPUTarget("cuda", architecture, 32), {"num_warps": warps}), 32 * warps


def type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    return {int: "i32", float: "fp32", type(None): "constexpr"}[type(value)]


def kernels_of(module: ModuleType) -> dict[str, JITFunction]:
    return {name: value for name, value in vars(module).items() if isinstance(value, JITFunction)}


def resources(kernel: CompiledKernel, path: Path) -> dict[str, int]:
    """What a program takes; a stack means that registers were spilled."""
    path.write_bytes(kernel.asm["cubin"])
    tool = Path(sys.modules["triton"].__file__).parent / "backends/nvidia/bin/cuobjdump"
    found = subprocess.run([str(tool), "-res-usage", str(path)], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", found)}


@pytest.mark.parametrize("case", kernel_cases.CASES)
def test_compiles_for_every_card(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the released model's shapes, the last two of each kernel's cases."""
    module = MODULES[case]
    launches = [Launches(kernel) for kernel in kernels_of(module).values()]
    with monkeypatch.context() as patch:
        for one in launches:
            patch.setattr(module, one.kernel.fn.__name__, one)
        for of_kernel, _ in list(kernel_cases.calls(case))[-2:]:
            of_kernel()
    used = [one for one in launches if one.seen]
    assert used
    for one in used:
        for architecture in ARCHITECTURES:
            for compiled, threads in one.compiled(architecture):
                taken = resources(compiled, tmp_path / "cubin")
                assert taken["STACK"] == 0, (one.kernel.fn.__name__, architecture)
                assert taken["REG"] * threads <= REGISTERS
                assert compiled.metadata.shared <= SHARED_MEMORY
                assert "tf32" not in compiled.asm["ptx"]
