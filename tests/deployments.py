"""Servers of the tiny model with two ranks, and what must become of them when a part of them dies."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import openai
import psutil
from serving import REPOSITORY, Server, running_server, wait_until

from vllm_twotower import ray_cluster

TINY = REPOSITORY / "models/tiny-twotower"
CONFIG = ("--config", str(REPOSITORY / "configs/ray-tp2.yaml"))
PROMPT = json.loads((TINY / "heldout.jsonl").read_text().splitlines()[0])["prompt"]
FAULT_SECONDS = 30
KILLED_RANK = "died unexpectedly|Connection (closed|reset) by peer"
"""Whichever comes first: vLLM sees that the process is gone, or the other rank loses the connection in a sum."""
_SHARED_MEMORY = "/dev/shm/"


@dataclass
class Deployment:
    """A server and the cluster it runs on; ``port`` is the cluster's, 0 without one."""

    server: Server
    port: int = 0

    def ranks(self) -> list[psutil.Process]:
        """The ranks' processes; over processes in the ranks' order."""
        if self.port:
            found, name = ray_cluster.cluster_processes(self.port), "RayWorkerProc"
        else:
            found, name = psutil.Process(self.server.process.pid).children(recursive=True), "VLLM::Worker_TP"
        ranks = [process for process in found if name in " ".join(process.cmdline())]
        assert len(ranks) == 2
        return sorted(ranks, key=lambda process: process.cmdline())

    def processes(self) -> list[psutil.Process]:
        """All that must end with the server."""
        server = psutil.Process(self.server.process.pid)
        return list(dict.fromkeys([server, *server.children(recursive=True), *self.ranks()]))


@contextmanager
def over_ray(
    log: Path, cluster: dict[str, str], *options: str, model: Path = TINY, **starter: Any
) -> Iterator[Deployment]:
    """A server as configs/ray-tp2.yaml describes it, in fp32, on the cluster with these variables."""
    options = (*CONFIG, "--dtype", "float32", *options)
    with running_server(model, log, *options, environment=cluster, **starter) as server:
        yield Deployment(server, port_of(cluster))


@contextmanager
def over_processes(
    log: Path, *options: str, environment: dict[str, str] | None = None, **starter: Any
) -> Iterator[Deployment]:
    """The same server without Ray, as its configuration has it."""
    options = (*CONFIG, "--distributed-executor-backend", "mp", *options)
    with running_server(TINY, log, *options, environment=environment, **starter) as server:
        yield Deployment(server)


def engine_of(deployment: Deployment) -> psutil.Process:
    """The engine's own process."""
    children = psutil.Process(deployment.server.process.pid).children()
    [engine] = [process for process in children if "EngineCore" in " ".join(process.cmdline())]
    return engine


def port_of(cluster: dict[str, str]) -> int:
    return int(cluster["RAY_ADDRESS"].split(":")[1])


def complete(server: Server, **options: object) -> str:
    """The answer to a greedy request."""
    arguments = {"prompt": PROMPT, "max_tokens": 64, "temperature": 0, **options}
    return server.openai.completions.create(model=server.model, **arguments).choices[0].text


@contextmanager
def ends_in_errors(deployment: Deployment, pattern: str) -> Iterator[None]:
    """The body causes a fault: all requests end in errors, the server ends and says why, and nothing is left of it."""
    server, processes = deployment.server, deployment.processes()
    errors: list[Exception] = []
    anew = replace(server)  # with new connections: the server closes those that were idle, perhaps at this moment
    for number in range(4):
        threading.Thread(target=endless_request, args=(anew, number % 2 == 0, errors), daemon=True).start()
    wait_until(lambda: server.metrics()["vllm:num_requests_running"] == 4, "four requests run")
    segments = {segment for process in processes for segment in segments_of(process)}
    queues = {segment for segment in segments if segment.name.startswith("psm_")}
    assert queues, "the ranks' message queues"
    assert not any(queue.exists() for queue in queues), "no name that a killed process could leave"
    yield
    deadline = time.monotonic() + FAULT_SECONDS  # from the fault on: the body may wait until it happens
    wait_until(lambda: len(errors) == 4, "every request is answered", deadline - time.monotonic())
    assert all(isinstance(error, openai.APIError) for error in errors), errors
    server.process.wait(timeout=deadline - time.monotonic())
    _, alive = psutil.wait_procs(processes, timeout=deadline - time.monotonic())
    assert not alive
    assert re.search(pattern, server.log_text())
    wait_until(lambda: not any(segment.exists() for segment in segments), f"{segments} are gone", 10)


def endless_request(server: Server, stream: bool, errors: list[Exception]) -> None:
    """Requests without an end; notes how it comes nevertheless."""
    endless = {"prompt": PROMPT, "max_tokens": 1500, "temperature": 0, "extra_body": {"ignore_eos": True}}
    try:
        while True:
            answer = server.openai.completions.create(model=server.model, stream=stream, **endless)
            for _ in answer if stream else ():
                pass
    except openai.APITimeoutError:
        return  # no answer
    except Exception as error:
        errors.append(error)


def runs(process: psutil.Process) -> bool:
    """Whether it has not ended; whoever must wait for its status may not have done so yet."""
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def segments_of(process: psutil.Process) -> set[Path]:
    """The shared memory that a process has mapped, by name."""
    return {Path(entry.path) for entry in process.memory_maps() if entry.path.startswith(_SHARED_MEMORY)}
