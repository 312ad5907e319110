"""What vLLM's own configuration makes of GPUs that are not there; run as a script.

python tests/fake_cuda.py CHECKPOINT

Prints a JSON list of two. For every compute capability and dtype: the attention backend of both towers (or the error),
how Triton multiplies fp32, and whether Ray's workers are told. And for every one of ``GRAPH_OPTIONS`` the mode of CUDA
graphs and their sizes, or the error. What vLLM's CUDA build and FlashInfer would import is replaced by mocks.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
import sys
from typing import Any
from unittest import mock

ABSENT = ("flashinfer", "vllm._C_stable_libtorch", "vllm._moe_C_stable_libtorch", "vllm.vllm_flash_attn")


class Mocks(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the packages ``ABSENT`` as mocks."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if any(name == package or name.startswith(f"{package}.") for package in ABSENT):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> mock.MagicMock:
        return mock.MagicMock(__name__=spec.name, __path__=[], __spec__=spec)

    def exec_module(self, module: Any) -> None:
        pass


sys.meta_path.insert(0, Mocks())

import vllm.platforms  # noqa: E402
from vllm.platforms.cuda import CudaPlatformBase  # noqa: E402
from vllm.platforms.interface import DeviceCapability  # noqa: E402


class Gpu(CudaPlatformBase):
    """A GPU with 80 GiB of one compute capability at a time."""

    capability = DeviceCapability(8, 0)

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
        return cls.capability

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        return "fake"

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        return 80 << 30


vllm.platforms._current_platform = Gpu()

import vllm._custom_ops  # noqa: E402

for question in (
    "cutlass_scaled_mm_supports_block_fp8",
    "cutlass_scaled_mm_supports_fp8",
    "cutlass_group_gemm_supported",
):
    setattr(vllm._custom_ops, question, lambda *args: False)  # vLLM's CUDA build would know

import vllm.config.vllm  # noqa: E402
from vllm import EngineArgs  # noqa: E402
from vllm.config import VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.platforms.cuda import _get_backend_priorities  # noqa: E402
from vllm.ray.ray_env import get_env_vars_to_copy  # noqa: E402
from vllm.v1.attention.selector import _cached_get_attn_backend, get_attn_backend  # noqa: E402

vllm.config.vllm.HAS_TRITON = True


GRAPH_OPTIONS = (
    {},
    {"max_num_seqs": 100},
    {"enforce_eager": True},
    {"compilation_config": {"cudagraph_mode": "NONE"}},
    {"compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY"}},
    {"compilation_config": {"cudagraph_mode": "PIECEWISE"}},
    {"cudagraph_capture_sizes": [64, 16, 1600]},
    {"cudagraph_capture_sizes": [16, 24]},
    {"max_cudagraph_capture_size": 50},
    {"max_cudagraph_capture_size": 8},
)


def configured(checkpoint: str, dtype: str = "bfloat16", **options: Any) -> VllmConfig:
    overrides = {"head_dim": 128}  # as in the released model; FlashInfer refuses the tiny ones
    options = {"max_num_seqs": 4, **options}
    return EngineArgs(model=checkpoint, dtype=dtype, hf_overrides=overrides, **options).create_engine_config()


def graphs(checkpoint: str, options: dict[str, Any]) -> list:
    """Their mode and sizes, or the error."""
    try:
        compilation = configured(checkpoint, **options).compilation_config
    except ValueError as error:
        return [str(error)]
    return [compilation.cudagraph_mode.name, compilation.cudagraph_capture_sizes]


def selected(checkpoint: str, dtype: str) -> str:
    """The backend of the context tower's attention, from which the denoiser's is made."""
    config = configured(checkpoint, dtype)
    model = config.model_config
    with set_current_vllm_config(config):
        return get_attn_backend(model.get_head_size(), model.dtype, config.cache_config.cache_dtype).get_name()


def main(checkpoint: str) -> None:
    """Prints what the options above give."""
    found = []
    for capability in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0), (12, 1)):
        for dtype in ("bfloat16", "float32"):
            Gpu.capability = DeviceCapability(*capability)
            for name in ("TRITON_F32_DEFAULT", "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"):
                os.environ.pop(name, None)
            _cached_get_attn_backend.cache_clear()
            _get_backend_priorities.cache_clear()
            try:
                backend = selected(checkpoint, dtype)
            except Exception as error:
                backend = f"{type(error).__name__}: {error}"
            precision = os.environ.get("TRITON_F32_DEFAULT")
            found.append([*capability, dtype, backend, precision, "TRITON_F32_DEFAULT" in get_env_vars_to_copy()])
    print(json.dumps([found, [graphs(checkpoint, options) for options in GRAPH_OPTIONS]]))


if __name__ == "__main__":
    main(sys.argv[1])
