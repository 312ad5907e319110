"""Whether Ray has devices for an engine's ranks.

Ray is asked by a process of its own, python -m vllm_twotower.ray_devices DEVICE NEEDED PATIENCE: vLLM may fork the
processes of an engine, and what is forked from one that has been connected to Ray waits for it forever.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import time


def check_ray_devices(needed: int, patience: float = 20.0) -> None:
    """Raises ValueError unless the running Ray cluster has ``needed`` devices free, or in ``patience`` seconds.

    vLLM itself would wait half an hour. Devices of an engine that was just ended take a moment to come free. Without a
    cluster, vLLM starts one on a machine with GPUs; on CPUs that would have no devices. RuntimeError with Ray's words
    if it fails otherwise.
    """
    import ray
    from vllm.platforms import current_platform

    device = current_platform.ray_device_key
    found = wait_for_devices(device, needed, patience) if ray.is_initialized() else _ask(device, needed, patience)
    if error := found.get("unreachable"):
        if current_platform.is_cpu() or "RAY_ADDRESS" in os.environ:
            how = f"vllm-twotower ray-up --ranks {needed}" if current_platform.is_cpu() else "see `ray status`"
            raise ValueError(
                f"distributed_executor_backend='ray' needs a Ray cluster, and none runs at RAY_ADDRESS "
                f"({os.environ.get('RAY_ADDRESS', 'not set')}) or on this machine: {how} ({error})"
            )
    elif found["free"] < needed:
        raise ValueError(
            f"{needed} ranks need as many {device}s of the Ray cluster, of which {found['free']:g} are free "
            f"(of {found['total']:g}); see `ray status`"
        )


def wait_for_devices(device: str, needed: int, patience: float) -> dict[str, float]:
    """Devices of the cluster that are ``free``, as soon as ``needed`` are or in ``patience`` seconds; and in ``total``.

    This process must be connected to the cluster.
    """
    import ray

    deadline = time.monotonic() + patience
    while (free := ray.available_resources().get(device, 0)) < needed and time.monotonic() < deadline:
        time.sleep(0.5)
    return {"free": free, "total": ray.cluster_resources().get(device, 0)}


def _ask(device: str, needed: int, patience: float) -> dict:
    command = [sys.executable, "-m", "vllm_twotower.ray_devices", device, str(needed), str(patience)]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode:
        raise RuntimeError(f"Ray's devices could not be counted:\n{answer.stderr}")
    return json.loads(answer.stdout.splitlines()[-1])


def main(device: str, needed: str, patience: str) -> dict:
    """What ``wait_for_devices`` finds in the cluster that runs, or why it is ``unreachable``."""
    import ray

    try:
        _probe_cluster()
        ray.init("auto", log_to_driver=False, logging_level=logging.ERROR)
    except OSError as error:
        return {"unreachable": str(error)}
    return wait_for_devices(device, int(needed), float(patience))


def _probe_cluster() -> None:
    """Raises OSError unless something listens where Ray looks for its cluster; ``ray.init`` would try for minutes."""
    from ray._private.services import canonicalize_bootstrap_address

    if "://" in os.environ.get("RAY_ADDRESS", ""):  # Ray Client's, which answers at once
        return
    if address := canonicalize_bootstrap_address("auto"):
        host, port = address.rsplit(":", 1)
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
