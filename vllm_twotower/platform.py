"""vLLM's CPU platform for TwoTower engines.

Ranks over Ray (vLLM places Ray's workers by a device that Ray counts, and names none for CPUs), fewer processes and no
small compilations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm import envs
from vllm.platforms.cpu import CpuPlatform

from vllm_twotower.patches.registry import serves_two_tower

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def cpu_platform() -> str | None:
    """The platform of a CPU build of vLLM, None with any other: an entry point of ``vllm.platform_plugins``.

    Ray's workers ask for their platform before they load general plugins.
    """
    from vllm.platforms import cpu_platform_plugin

    return None if cpu_platform_plugin() is None else "vllm_twotower.platform.TwoTowerCpuPlatform"


class TwoTowerCpuPlatform(CpuPlatform):
    """vLLM's, except for what is said at each member."""

    # A rank over Ray takes one of the GPUs that the cluster was told it has: ``ray start --num-gpus``.
    ray_device_key = "GPU"
    # Sharded embeddings mask their tokens with a compiled function, which a CPU spends seconds of the first request on.
    simple_compile_backend = "eager"

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """A single rank that binds no threads runs in the engine's process.

        vLLM gives it a process of its own, in whose environment it writes how OpenMP's threads are bound: without
        binding that costs a start of vLLM and two messages a step for nothing.
        """
        parallel = vllm_config.parallel_config
        in_process = parallel.distributed_executor_backend == "uni" and envs.VLLM_CPU_OMP_THREADS_BIND == "nobind"
        super().check_and_update_config(vllm_config)
        if in_process and serves_two_tower(vllm_config.model_config):
            parallel.distributed_executor_backend = "uni"
