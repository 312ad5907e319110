"""How an engine's processes start, and whether Ray has devices for its ranks."""

from __future__ import annotations

import logging
import os
import socket
import time

from vllm.logger import init_logger

logger = init_logger(__name__)

START_METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
"""vLLM's variable: whether its processes are forked or spawned."""


def spawn_processes(asked: str | None, reason: str) -> None:
    """Has vLLM spawn its processes; a warning gives the reason if ``asked``, the variable's value, is to fork them."""
    if asked == "fork":
        logger.warning("%s=fork: processes are spawned, since %s", START_METHOD, reason)
    os.environ[START_METHOD] = "spawn"


def check_ray_devices(needed: int, patience: float = 20.0) -> None:
    """Raises ValueError unless the running Ray cluster has ``needed`` devices free, or in ``patience`` seconds.

    vLLM itself would wait half an hour. Devices of an engine that was just ended take a moment to come free. Without a
    cluster, vLLM starts one on a machine with GPUs; on CPUs that would have no devices.

    Connects to the cluster unless this process is connected, and then has vLLM spawn its processes: a forked one would
    wait for Ray forever.
    """
    import ray
    from vllm.platforms import current_platform

    device, joins = current_platform.ray_device_key, not ray.is_initialized()
    if joins:
        try:
            _probe_cluster()
            ray.init("auto", log_to_driver=False, logging_level=logging.ERROR)
            spawn_processes(os.environ.get(START_METHOD), "this one was connected to Ray, where a forked one hangs")
        except OSError as error:
            if current_platform.is_cpu() or "RAY_ADDRESS" in os.environ:
                how = f"vllm-twotower ray-up --ranks {needed}" if current_platform.is_cpu() else "see `ray status`"
                raise ValueError(
                    f"distributed_executor_backend='ray' needs a Ray cluster, and none runs at RAY_ADDRESS "
                    f"({os.environ.get('RAY_ADDRESS', 'not set')}) or on this machine: {how} ({error})"
                ) from None
            return
    try:
        deadline = time.monotonic() + patience
        while (free := ray.available_resources().get(device, 0)) < needed:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"{needed} ranks need as many {device}s of the Ray cluster, of which {free:g} are free "
                    f"(of {ray.cluster_resources().get(device, 0):g}); see `ray status`"
                )
            time.sleep(0.5)
    finally:
        if joins:
            ray.shutdown()


def _probe_cluster() -> None:
    """Raises OSError unless something listens where Ray looks for its cluster; ``ray.init`` would try for minutes."""
    from ray._private.services import canonicalize_bootstrap_address

    if "://" in os.environ.get("RAY_ADDRESS", ""):  # Ray Client's, which answers at once
        return
    if address := canonicalize_bootstrap_address("auto"):
        host, port = address.rsplit(":", 1)
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
