"""Whether Ray has devices for an engine's ranks.

Ray is asked by a process of its own, python -m vllm_twotower.ray_devices RESOURCE NEEDED PATIENCE: vLLM may fork the
processes of an engine, and what is forked from one that has been connected to Ray waits for it forever.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup


def check_ray_devices(ranks: int, group: PlacementGroup | None = None, patience: float = 20.0) -> None:
    """Raises ValueError unless Ray has free devices for the ranks, or has them within ``patience`` seconds.

    vLLM itself would wait half an hour, or forever. An engine that was just ended gives its devices back in a moment.

    The devices are those of the placement group that vLLM will use: ``group``, else that of the Ray task or actor in
    which this runs. Without a group they are the cluster's, and if that may add nodes, vLLM is left to wait for them.
    Without a cluster, vLLM starts one on a machine with GPUs; on CPUs that would have no devices. RuntimeError with
    Ray's words if it fails otherwise.
    """
    import ray
    from vllm import envs
    from vllm.logger import init_logger
    from vllm.platforms import current_platform

    device, is_connected = current_platform.ray_device_key, ray.is_initialized()
    if group is None and is_connected:
        group = ray.util.get_current_placement_group()
    resource, needed = device, ranks
    if group is not None:
        resource, needed = f"{device}_group_{group.id.hex()}", ranks * envs.VLLM_RAY_PER_WORKER_GPUS
    found = (wait_for_devices if is_connected else _ask)(resource, needed, patience)
    if error := found.get("unreachable"):
        if current_platform.is_cpu() or "RAY_ADDRESS" in os.environ:
            how = f"vllm-twotower ray-up --ranks {ranks}" if current_platform.is_cpu() else "see `ray status`"
            raise ValueError(
                f"distributed_executor_backend='ray' needs a Ray cluster, and none runs at RAY_ADDRESS "
                f"({os.environ.get('RAY_ADDRESS', 'not set')}) or on this machine: {how} ({error})"
            )
    elif found["free"] < needed:
        counts = f"of which {found['free']:g} are free (of {found['total']:g})"
        if group is not None:
            raise ValueError(
                f"tensor_parallel_size={ranks} needs {needed:g} {device}s of the Ray placement group, {counts}; the "
                "actor that starts the engine must leave them to its ranks"
            )
        message = f"tensor_parallel_size={ranks} needs {needed:g} {device}s of the Ray cluster, {counts}"
        if not found["may_grow"]:
            raise ValueError(f"{message}; see `ray status`")
        init_logger(__name__).warning("%s; waiting for nodes that Ray's autoscaler may add", message)


def wait_for_devices(resource: str, needed: float, patience: float) -> dict[str, float]:
    """Devices that are ``free``, as soon as ``needed`` are or after ``patience`` seconds, and those in ``total``.

    They are counted under the name ``resource``, in hundredths, rounded up: Ray Serve makes an engine's configuration
    in a task that takes a thousandth of a device. ``may_grow``: whether an autoscaler may add nodes. This process must
    be connected to the cluster.
    """
    import ray

    deadline = time.monotonic() + patience
    while True:
        free = math.ceil(100 * ray.available_resources().get(resource, 0)) / 100
        if free >= needed or time.monotonic() > deadline:
            return {"free": free, "total": ray.cluster_resources().get(resource, 0), "may_grow": _may_grow()}
        time.sleep(0.5)


def _may_grow() -> bool:
    """Whether Ray's nodes have types, which an autoscaler needs; a node that was started by hand has only its name.

    The types are labels of the nodes or, with Ray's first autoscaler, in its report.
    """
    import ray
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray.experimental.internal_kv import _internal_kv_get

    nodes = ray.nodes()
    status = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or "{}")
    reported = (status.get("autoscaler_report") or {}).get("active_nodes", ())
    names = {f"node_{node['NodeID']}" for node in nodes}
    return not names.issuperset(reported) or any("ray.io/node-group" in node["Labels"] for node in nodes)


def _ask(resource: str, needed: float, patience: float) -> dict:
    command = [sys.executable, "-m", "vllm_twotower.ray_devices", resource, str(needed), str(patience)]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode:
        raise RuntimeError(f"Ray's devices could not be counted:\n{answer.stderr}")
    return json.loads(answer.stdout.splitlines()[-1])


def main(resource: str, needed: str, patience: str) -> dict:
    """What ``wait_for_devices`` finds in the cluster that runs, or why it is ``unreachable``."""
    import ray

    try:
        _probe_cluster()
        ray.init("auto", log_to_driver=False, logging_level=logging.ERROR)
    except OSError as error:
        return {"unreachable": str(error)}
    return wait_for_devices(resource, float(needed), float(patience))


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
