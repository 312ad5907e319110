"""vLLM's CPU platform for TwoTower engines.

With Ray: vLLM places Ray workers by a device that Ray counts, and names none for CPUs. Without small compilations.
"""

from __future__ import annotations

from vllm.platforms.cpu import CpuPlatform


def cpu_platform() -> str | None:
    """The platform of a CPU build of vLLM, None with any other: an entry point of ``vllm.platform_plugins``.

    Ray's workers ask for their platform before they load general plugins.
    """
    from vllm.platforms import cpu_platform_plugin

    return None if cpu_platform_plugin() is None else "vllm_twotower.platform.RayCpuPlatform"


class RayCpuPlatform(CpuPlatform):
    """A rank takes one of the GPUs that the cluster was told it has: ``ray start --num-gpus``."""

    ray_device_key = "GPU"
    # Sharded embeddings mask their tokens with a compiled function, which a CPU spends seconds of the first request on.
    simple_compile_backend = "eager"
