"""A Ray cluster as `vllm-twotower ray-up` starts it, ended with everything in it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from serving import free_port

from vllm_twotower import ray_cluster


def ray_up(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """The command, as a user types it."""
    command = [str(Path(sys.executable).with_name("vllm-twotower")), "ray-up", *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)


@contextmanager
def running_cluster(ranks: int, **environment: str) -> Iterator[dict[str, str]]:
    """Environment variables of a server that is to use the cluster; ``environment`` are the cluster's own."""
    port = free_port()
    try:
        result = ray_up("--ranks", str(ranks), "--port", str(port), **environment)
        assert result.returncode == 0, result.stderr
        lines = [line.removeprefix("export ") for line in result.stdout.splitlines()]
        yield environment | dict(line.split("=", 1) for line in lines)
    finally:
        ray_cluster.end(port)
        assert ray_cluster.cluster_processes(port) == []
