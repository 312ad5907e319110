"""Starts a Ray cluster on this machine for tensor parallelism on CPUs: reachable from this machine only, with a token.

Prints what the server's shell needs: eval "$(vllm-twotower ray-up --ranks 2)". `ray stop` ends the cluster.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import re
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil

LOOPBACK = "127.0.0.1"
START_ATTEMPTS = 3
# Ray gives a node 30 seconds, whatever else the machine does (ray/_private/node.py).
_TIMED_OUT = "timed out during startup"
_RAY = (sys.executable, "-m", "ray.scripts.scripts")


class RayClusterError(RuntimeError):
    """A cluster cannot be started, or not safely."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--ranks", type=int, required=True, help="tensor-parallel ranks, each one logical GPU of Ray")
    parser.add_argument("--port", type=int, default=6379, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=0, help="of a rank (default: the cores divided by the ranks)")


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    try:
        variables = start(args.ranks, args.port, args.threads)
    except RayClusterError as error:
        raise SystemExit(f"vllm-twotower ray-up: {error}") from None
    print("\n".join(f"export {name}={value}" for name, value in variables.items()))


def start(ranks: int, port: int, threads: int = 0) -> dict[str, str]:
    """Starts the cluster; returns the environment variables of a server that is to use it.

    ``ranks`` is the number of logical GPUs. Raises RayClusterError if an argument is impossible, the port is taken,
    token authentication is switched off, the machine has GPUs, or a process of Ray's listens on other interfaces than
    the loopback, in which case the cluster is ended.
    """
    if ranks < 1:
        raise RayClusterError(f"--ranks is {ranks}: it must be at least 1")
    if not 1024 <= port <= 65535:
        raise RayClusterError(f"--port is {port}: it must be within 1024 and 65535")
    cores = len(os.sched_getaffinity(0))
    threads = threads or max(1, cores // ranks)
    variables = _variables(port, threads)
    if (mode := os.environ.get("RAY_AUTH_MODE", "token")) != "token":
        raise RayClusterError(
            f"RAY_AUTH_MODE is {mode!r}: whoever can reach such a cluster can run code on it; unset it"
        )
    with socket.socket() as probe:
        if probe.connect_ex((LOOPBACK, port)) == 0:
            raise RayClusterError(f"port {port} is taken, perhaps by a cluster: `ray stop` ends it, or choose a --port")
    from vllm.platforms import current_platform  # takes seconds

    if not current_platform.is_cpu():
        raise RayClusterError("this machine has GPUs that Ray finds itself; use `ray start --head`")
    environment = os.environ | variables
    environment.pop("RAY_ADDRESS")  # that of a cluster to join
    _ray(["get-auth-token", "--generate"], environment)
    arguments = [
        "start",
        "--head",
        f"--node-ip-address={LOOPBACK}",
        f"--port={port}",
        f"--num-gpus={ranks}",
        # Serve's and Data's replicas take a CPU each; what feeds them would never get one.
        f"--num-cpus={cores + ranks}",
        "--include-dashboard=false",
        "--disable-usage-stats",
    ]
    for attempt in range(START_ATTEMPTS):
        try:
            _ray(arguments, environment)
            break
        except RayClusterError as error:
            end(port)
            if _TIMED_OUT not in str(error) or attempt == START_ATTEMPTS - 1:
                raise
    if exposed := exposed_addresses(cluster_processes(port)):
        end(port)
        raise RayClusterError(f"Ray listened on {', '.join(exposed)}, beyond this machine; the cluster was ended")
    return variables


def end(port: int) -> None:
    """Ends the cluster at the port and its workers, as `ray stop` does with all clusters of a machine.

    What Ray wrote down of it goes too: its logs, and its address as that of this machine's cluster.
    """
    from ray._common.utils import get_ray_address_file

    session, processes = _find(port)
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=30)
    if session is not None:
        shutil.rmtree(session, ignore_errors=True)
    current = Path(get_ray_address_file(None))
    if current.exists() and current.read_text().strip().endswith(f":{port}"):
        current.unlink()


def cluster_processes(port: int) -> list[psutil.Process]:
    """The processes of the cluster whose head listens at the port, and their children, workers among them."""
    return _find(port)[1]


def _find(port: int) -> tuple[str | None, list[psutil.Process]]:
    """The folder of the cluster's session, which the commands of its processes name, and the processes."""
    commands = {
        process: " ".join([*(process.info["cmdline"] or ()), ""]) for process in psutil.process_iter(["cmdline"])
    }
    head = next((command for command in commands.values() if f"--gcs_server_port={port} " in command), None)
    if head is None:
        return None, []
    session = re.findall(r"--log_dir=(\S+)/logs ", head)[0]
    # The server of Ray's client, which ranks do not use but a head always has, does not name the session.
    names = (session, f"ray.util.client.server --address={LOOPBACK}:{port} ")
    found = dict.fromkeys(process for process, command in commands.items() if any(name in command for name in names))
    for process in list(found):
        with suppress(psutil.NoSuchProcess):
            found |= dict.fromkeys(process.children(recursive=True))
    return session, list(found)


def exposed_addresses(processes: list[psutil.Process]) -> list[str]:
    """Where the processes listen for connections from other machines."""
    found = set()
    for process in processes:
        try:
            connections = process.net_connections("inet")
        except psutil.NoSuchProcess:
            continue
        for connection in connections:
            if connection.status == psutil.CONN_LISTEN and not _is_loopback(connection.laddr.ip):
                found.add(f"{connection.laddr.ip}:{connection.laddr.port}")
    return sorted(found)


def _is_loopback(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback


def _variables(port: int, threads: int) -> dict[str, str]:
    return {
        "RAY_ADDRESS": f"{LOOPBACK}:{port}",
        "RAY_AUTH_MODE": "token",
        # Else Ray binds to every interface, whatever address it is given.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Ray's workers would leave the cores to every other process.
        "RAY_worker_niceness": "0",
        "VLLM_HOST_IP": LOOPBACK,
        # Ranks whose threads share cores wait for each other in every loop.
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }


def _ray(arguments: list[str], environment: dict[str, str]) -> None:
    result = subprocess.run([*_RAY, *arguments], env=environment, capture_output=True, text=True)
    if result.returncode:
        raise RayClusterError(f"ray {arguments[0]} failed:\n{result.stdout}{result.stderr}")
