"""`vllm serve --config configs/ray-tp2.yaml` with real clients, and what becomes of it when a part of it dies."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import openai
import psutil
import pytest
from ray_clusters import ray_up, running_cluster
from serving import REPOSITORY, Server, free_port, refused_start, running_server, wait_until

from vllm_twotower import ray_cluster

TINY = REPOSITORY / "models/tiny-twotower"
CONFIG = ("--config", str(REPOSITORY / "configs/ray-tp2.yaml"))
OVER_PROCESSES = (*CONFIG, "--distributed-executor-backend", "mp")
SHARED_MEMORY = Path("/dev/shm")
PROMPT = "Question: Tom has 12 apples and buys 7 more. How many apples does he have?\nAnswer:"
FAULT_SECONDS = 30

pytestmark = pytest.mark.ray


@dataclass
class Deployment:
    """A server and the cluster it runs on; ``port`` is the cluster's, 0 without one."""

    server: Server
    port: int

    def workers(self) -> list[psutil.Process]:
        """The ranks' processes."""
        if self.port:
            found = ray_cluster.cluster_processes(self.port)
            return [process for process in found if "RayWorkerProc" in " ".join(process.cmdline())]
        found = psutil.Process(self.server.process.pid).children(recursive=True)
        return [process for process in found if "VLLM::Worker" in " ".join(process.cmdline())]


@contextmanager
def deployment(folder: Path, over_ray: bool) -> Iterator[Deployment]:
    """A server with two ranks, on a cluster of its own if it is over Ray."""
    if not over_ray:
        with running_server(TINY, folder / "log", *OVER_PROCESSES) as server:
            yield Deployment(server, 0)
        return
    with running_cluster(2) as variables:
        port = int(variables["RAY_ADDRESS"].split(":")[1])
        with running_server(TINY, folder / "log", *CONFIG, environment=variables) as server:
            yield Deployment(server, port)


def segments() -> set[str]:
    return {path.name for path in SHARED_MEMORY.iterdir()} if SHARED_MEMORY.exists() else set()


def complete(server: Server, **options: object) -> str:
    arguments = {"prompt": PROMPT, "max_tokens": 64, "temperature": 0, **options}
    return server.openai.completions.create(model=server.model, **arguments).choices[0].text


@pytest.mark.parametrize("fault", ["worker of ray", "raylet", "worker of mp", "memory of mp"])
def test_faults_end_the_server_with_errors(fault: str, tmp_path: Path) -> None:
    """Every request is answered, with an error; the server ends; no process and no shared memory is left."""
    before = segments()
    with deployment(tmp_path, over_ray=not fault.endswith("mp")) as one:
        server, process = one.server, psutil.Process(one.server.process.pid)
        if fault == "worker of ray":
            check_clients(server)
        else:
            complete(server)
        workers, family = one.workers(), [process, *process.children(recursive=True)]
        assert len(workers) == 2
        errors: list[Exception] = []
        threads = [threading.Thread(target=endless_request, args=(server, errors), daemon=True) for _ in range(4)]
        for thread in threads:
            thread.start()
        wait_until(lambda: server.metrics()["vllm:num_requests_running"] == 4, "four requests run")
        deadline = time.monotonic() + FAULT_SECONDS
        if fault == "raylet":
            [raylet] = [p for p in ray_cluster.cluster_processes(one.port) if p.name() == "raylet"]
            raylet.send_signal(signal.SIGKILL)
        elif fault == "memory of mp":
            workers[1].rlimit(psutil.RLIMIT_AS, (1 << 20, 1 << 20))
        else:
            workers[1].send_signal(signal.SIGKILL)
        wait_until(lambda: len(errors) == 4, "every request is answered", deadline - time.monotonic())
        assert all(isinstance(error, openai.APIError) for error in errors), errors
        _, alive = psutil.wait_procs([*family, *workers], timeout=deadline - time.monotonic())
        assert not alive
    wait_until(lambda: segments() <= before, f"no new shared memory ({segments() - before})", 10)


def endless_request(server: Server, errors: list[Exception]) -> None:
    """Requests without an end; notes how it comes nevertheless."""
    try:
        while True:
            complete(server, max_tokens=1500, extra_body={"ignore_eos": True})
    except openai.APITimeoutError:
        return  # no answer
    except Exception as error:
        errors.append(error)


def check_clients(server: Server) -> None:
    """Sixteen clients at once: streams, aborts, and answers that are those of a client alone."""
    alone = complete(server)
    assert "The answer is 19." in alone
    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(lambda _: complete(server), range(32))) == {alone}

    async def stream(client: openai.AsyncOpenAI, number: int) -> str:
        abort = number % 4 == 0
        chunks = []
        options = {"max_tokens": 1500, "extra_body": {"ignore_eos": True}} if abort else {"max_tokens": 64}
        answer = await client.completions.create(
            model=server.model, prompt=PROMPT, temperature=0, stream=True, **options
        )
        async for chunk in answer:
            chunks.append(chunk.choices[0].text)
            if abort and len(chunks) == 2:
                await answer.close()
                return alone
        return "".join(chunks)

    async def streams() -> list[str]:
        async with server.async_openai() as client:
            return await asyncio.gather(*(stream(client, number) for number in range(16)))

    assert set(asyncio.run(streams())) == {alone}
    wait_until(lambda: server.metrics()["vllm:num_requests_running"] == 0, "aborted requests are gone")


def test_too_few_devices_are_refused(tmp_path: Path) -> None:
    with running_cluster(1) as variables:
        started = time.monotonic()
        status, log = refused_start(TINY, tmp_path / "log", *CONFIG, environment=variables)
    assert status != 0
    assert "2 ranks need as many GPUs of the Ray cluster, of which 1 are free (of 1)" in log
    assert time.monotonic() - started < 2 * FAULT_SECONDS  # the imports of a start among them


def test_no_cluster_is_refused(tmp_path: Path) -> None:
    address = {"RAY_ADDRESS": f"127.0.0.1:{free_port()}"}
    status, log = refused_start(TINY, tmp_path / "log", *CONFIG, environment=address)
    assert status != 0
    assert "vllm-twotower ray-up --ranks 2" in log


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (("--ranks", "0"), {}, "--ranks is 0"),
        (("--ranks", "2", "--port", "80"), {}, "--port is 80"),
        (("--ranks", "2"), {"RAY_AUTH_MODE": "disabled"}, "RAY_AUTH_MODE is 'disabled'"),
    ],
)
def test_refused_clusters(arguments: tuple[str, ...], environment: dict[str, str], message: str) -> None:
    result = ray_up(*arguments, **environment)
    assert result.returncode != 0
    assert message in result.stderr


def test_a_cluster_is_reachable_from_this_machine_only() -> None:
    with running_cluster(1) as variables:
        port = int(variables["RAY_ADDRESS"].split(":")[1])
        processes = ray_cluster.cluster_processes(port)
        assert {"gcs_server", "raylet"} <= {process.name() for process in processes}
        assert ray_cluster.exposed_addresses(processes) == []
        result = ray_up("--ranks", "1", "--port", str(port))
        assert result.returncode != 0
        assert f"port {port} is taken" in result.stderr
    assert ray_cluster.cluster_processes(port) == []


def test_exposed_addresses_are_found() -> None:
    import socket

    with socket.create_server(("0.0.0.0", 0)) as listener, socket.create_server(("127.0.0.1", 0)):
        port = listener.getsockname()[1]
        assert f"0.0.0.0:{port}" in ray_cluster.exposed_addresses([psutil.Process(os.getpid())])
