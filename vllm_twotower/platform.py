"""vLLM's CPU platform for TwoTower engines.

Ranks over Ray (vLLM places Ray's workers by a device that Ray counts, and names none for CPUs), fewer processes and no
small compilations.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vllm import envs
from vllm.logger import init_logger
from vllm.platforms.cpu import CpuPlatform

from vllm_twotower.patches.registry import serves_two_tower

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(__name__)

_START_METHOD = "VLLM_WORKER_MULTIPROC_METHOD"


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
        """Where no threads are bound, a single rank runs in the engine's process, and processes may be forked.

        vLLM writes how OpenMP's threads are bound into the environment of a process of its own for every rank, which
        must be spawned to read it: without binding that costs starts of vLLM and two messages a step for nothing.
        """
        parallel = vllm_config.parallel_config
        backend, method = parallel.distributed_executor_backend, os.environ.get(_START_METHOD)
        super().check_and_update_config(vllm_config)
        if not serves_two_tower(vllm_config.model_config):
            return
        if envs.VLLM_CPU_OMP_THREADS_BIND == "nobind":
            if backend == "uni":
                parallel.distributed_executor_backend = backend
            if method == "fork":
                os.environ[_START_METHOD] = method
        elif method == "fork":
            logger.warning(
                "%s=fork: processes are spawned, since VLLM_CPU_OMP_THREADS_BIND=%s binds their threads",
                _START_METHOD,
                envs.VLLM_CPU_OMP_THREADS_BIND,
            )
