"""vLLM's CPU platform, which serves TwoTower engines differently; any other model's as vLLM's own does.

Ranks over Ray (vLLM places Ray's workers by a device that Ray counts, and names none for CPUs), fewer processes, and a
KV cache that fits beside what else runs on the machine.
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

logger = init_logger(f"vllm.{__name__}")  # vLLM shows what is logged below its own name

_START_METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
GIB = 1 << 30
LARGEST_DEFAULT_KV_CACHE = 4 * GIB


def cpu_platform() -> str | None:
    """The platform of a CPU build of vLLM, None with any other: an entry point of ``vllm.platform_plugins``.

    Ray's workers ask for their platform before they load general plugins, and before they know their model.
    """
    from vllm.platforms import cpu_platform_plugin

    return None if cpu_platform_plugin() is None else "vllm_twotower.platform.TwoTowerCpuPlatform"


class TwoTowerCpuPlatform(CpuPlatform):
    """vLLM's, except for what is said at each member."""

    # A rank over Ray takes one of the GPUs that the cluster was told it has: ``ray start --num-gpus``.
    ray_device_key = "GPU"

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """vLLM's, and for TwoTower engines the choices of the functions below.

        Raises ValueError if another model is to run over Ray: vLLM refuses that in the engine, where the platform has
        no ``ray_device_key``.
        """
        parallel = vllm_config.parallel_config
        backend, method = parallel.distributed_executor_backend, os.environ.get(_START_METHOD)
        super().check_and_update_config(vllm_config)
        if serves_two_tower(vllm_config.model_config):
            vllm_config.quant_config = None  # experts of int8 and int4 stay so in our layers, the rest is made plain
            _choose_processes(vllm_config, backend, method)
            _bound_kv_cache(vllm_config)
        elif "ray" in (backend, parallel.data_parallel_backend):
            raise ValueError(f"current platform {cls.device_name} does not support ray.")


def _choose_processes(vllm_config: VllmConfig, backend: str | type | None, method: str | None) -> None:
    """Where no threads are bound, a single rank runs in the engine's process, and processes may be forked.

    vLLM writes how OpenMP's threads are bound into the environment of a process of its own for every rank, which must
    be spawned to read it: without binding that costs starts of vLLM and two messages a step for nothing. ``backend``
    and ``method`` are what vLLM's platform was given.
    """
    if envs.VLLM_CPU_OMP_THREADS_BIND == "nobind":
        if backend == "uni":
            vllm_config.parallel_config.distributed_executor_backend = backend
        if method == "fork":
            os.environ[_START_METHOD] = method
    elif method == "fork":
        logger.warning(
            "%s=fork: processes are spawned, since VLLM_CPU_OMP_THREADS_BIND=%s binds their threads",
            _START_METHOD,
            envs.VLLM_CPU_OMP_THREADS_BIND,
        )


def _bound_kv_cache(vllm_config: VllmConfig) -> None:
    """Without a wish of the user, ranks share half of the memory that is free now, and none takes more than 4 GiB.

    vLLM would take 92 % of a node's memory, and refuse to start where so much is not free.
    """
    # A platform may be asked for while vLLM's own modules are being imported.
    from vllm.config import CacheConfig
    from vllm.utils.cpu_resource_utils import get_memory_node_info, get_visible_memory_node

    cache = vllm_config.cache_config
    if cache.kv_cache_memory_bytes is not None or cache.gpu_memory_utilization != CacheConfig.gpu_memory_utilization:
        return
    ranks = vllm_config.parallel_config.world_size_across_dp
    free = min(get_memory_node_info(node).available_memory for node in get_visible_memory_node())
    cache.kv_cache_memory_bytes = min(LARGEST_DEFAULT_KV_CACHE, free // 2 // ranks)
    logger.info(
        "kv_cache_memory_bytes=%.1fG for each rank, since neither it nor gpu_memory_utilization was set",
        cache.kv_cache_memory_bytes / GIB,
    )
