"""Engines over Ray: their tokens, `vllm serve --config configs/ray-tp2.yaml`, and its end when a part of it dies."""

from __future__ import annotations

import asyncio
import inspect
import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import golden_data
import openai
import psutil
import pytest
from answers import Answer, assert_same, completion_arguments, expected_answers, golden_request, of_completion
from deployments import (
    FAULT_SECONDS,
    KILLED_RANK,
    PROMPT,
    Deployment,
    complete,
    ends_in_errors,
    over_ray,
    port_of,
)
from ray._private import node
from ray_clusters import ray_up, running_cluster
from serving import Server, free_port, token_request, wait_until
from two_ranks import random_requests
from vllm.tokenizers import get_tokenizer

from vllm_twotower import ray_cluster
from vllm_twotower.ray_devices import check_ray_devices
from vllm_twotower.reference import TwoTowerModel

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """Variables of a cluster with two devices, which servers use one after the other."""
    with running_cluster(2) as variables:
        yield variables


def test_a_cluster_is_reachable_from_this_machine_only(cluster: dict[str, str]) -> None:
    processes = ray_cluster.cluster_processes(port_of(cluster))
    assert {"gcs_server", "raylet"} <= {process.name() for process in processes}
    assert ray_cluster.exposed_addresses(processes) == []


@pytest.fixture(scope="class")
def deployment(cluster: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    log = tmp_path_factory.mktemp("server") / "log"
    with over_ray(log, cluster, model=golden_data.checkpoint("C")) as deployment:
        yield deployment


class TestOverRay:
    """One server: its tokens and clients, no device left for another one, and its end with a rank's."""

    def test_goldens(self, deployment: Deployment) -> None:
        runs = golden_data.diffusion_runs("C") + golden_data.diffusion_runs("C", "eos_runs")
        requests = [(golden_request(run), run.tokens) for run in runs]
        for prompt in golden_data.prompts("C"):
            run = prompt["ar"]
            request = token_request(prompt["ids"], run["max_new_tokens"], diffusion_mode="ar")
            requests.append((request, tuple(run["new_ids"])))
        answers = at_once(deployment.server, [request for request, _ in requests])
        assert [tuple(answer.token_ids) for [answer] in answers] == [tokens for _, tokens in requests]

    def test_random_requests(self, deployment: Deployment) -> None:
        """Seeds, filters, rules and strategies: every rank takes the decisions of the oracle, which knows no ranks."""
        drawn, checkpoint = random_requests(), golden_data.checkpoint("C")
        answers = at_once(deployment.server, [completion_arguments(one.prompt, one.options) for one in drawn])
        model, tokenizer = TwoTowerModel.from_pretrained(checkpoint), get_tokenizer(str(checkpoint))
        for one, got in zip(drawn, answers, strict=True):
            assert_same(got, expected_answers(model, tokenizer, one.prompt, one.options))

    def test_clients(self, deployment: Deployment) -> None:
        check_clients(deployment.server)

    def test_no_device_left(
        self, deployment: Deployment, cluster: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The check of a server's start."""
        for name, value in cluster.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=r"needs 2 GPUs of the Ray cluster, of which 0 are free \(of 2\)"):
            check_ray_devices(2, patience=1)
        assert deployment.server.answers()

    def test_killed_rank(self, deployment: Deployment) -> None:
        with ends_in_errors(deployment, KILLED_RANK):
            deployment.ranks()[1].kill()


def at_once(server: Server, requests: list[dict]) -> list[list[Answer]]:
    """The choices of completions that are asked for by clients of their own."""
    with ThreadPoolExecutor(16) as pool:
        done = list(pool.map(lambda one: server.openai.completions.create(model=server.model, **one), requests))
    return [[of_completion(choice) for choice in answer.choices] for answer in done]


def check_clients(server: Server) -> None:
    """Sixteen clients at once: streams, aborts, and the same answers."""
    alone = complete(server)
    assert alone.strip()
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


def test_no_cluster_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    with pytest.raises(ValueError, match="needs a Ray cluster, .* vllm-twotower ray-up --ranks 2"):
        check_ray_devices(2)


def test_a_cluster_that_is_gone_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray remembers the address of a cluster that was killed."""
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray/ray_current_cluster").write_text(f"127.0.0.1:{free_port()}")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    started = time.monotonic()
    with pytest.raises(ValueError, match="needs a Ray cluster, and none runs .* vllm-twotower ray-up --ranks 2"):
        check_ray_devices(2)
    assert time.monotonic() - started < FAULT_SECONDS


@pytest.mark.parametrize(
    ("ranks", "port", "mode", "message"),
    [
        (0, 6379, "token", "--ranks is 0: it must be at least 1"),
        (2, 80, "token", "--port is 80: it must be within 1024 and 65535"),
        (2, 6379, "disabled", "RAY_AUTH_MODE is 'disabled'"),
    ],
)
def test_refused_clusters(ranks: int, port: int, mode: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    with pytest.raises(ray_cluster.RayClusterError, match=message):
        ray_cluster.start(ranks, port)


def test_a_second_cluster_at_a_port_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = ray_up("--ranks", "1", "--port", str(port))
    assert result.returncode != 0
    assert f"vllm-twotower ray-up: port {port} is taken" in result.stderr


@pytest.mark.parametrize(
    ("failures", "attempts"),
    [(["it timed out during startup."], 2), (["it timed out during startup."] * 3, 3), (["no such option"], 1)],
)
def test_a_start_that_took_too_long_is_tried_again(
    failures: list[str], attempts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a failed start leaves behind is ended."""
    started, ended, left = [], [], list(failures)

    def fake(arguments: list[str], environment: dict[str, str]) -> None:
        if arguments[0] == "start":
            started.append(arguments)
            if left:
                raise ray_cluster.RayClusterError(left.pop(0))

    monkeypatch.setattr(ray_cluster, "_ray", fake)
    monkeypatch.setattr(ray_cluster, "end", ended.append)
    port = free_port()
    if len(failures) == attempts:
        with pytest.raises(ray_cluster.RayClusterError, match=failures[-1]):
            ray_cluster.start(1, port)
    else:
        ray_cluster.start(1, port)
    assert (len(started), ended) == (attempts, [port] * len(failures))


def test_ray_says_so() -> None:
    source = inspect.getsource(node)
    assert ray_cluster._TIMED_OUT in source
    assert "raylet_start_wait_time_s = 30\n" in source  # longer, or to be set: no need to try again


def test_exposed_addresses_are_found() -> None:
    with socket.create_server(("0.0.0.0", 0)) as listener, socket.create_server(("127.0.0.1", 0)):
        port = listener.getsockname()[1]
        assert ray_cluster.exposed_addresses([psutil.Process(os.getpid())]) == [f"0.0.0.0:{port}"]


def test_an_exposed_cluster_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "exposed_addresses", lambda processes: ["0.0.0.0:1234"])
    port = free_port()
    with pytest.raises(ray_cluster.RayClusterError, match="Ray listened on 0.0.0.0:1234"):
        ray_cluster.start(1, port)
    assert ray_cluster.cluster_processes(port) == []


@pytest.mark.slow
def test_killed_raylet(cluster: dict[str, str], tmp_path: Path) -> None:
    """Last, since the cluster does not survive it."""
    with over_ray(tmp_path / "log", cluster) as deployment, ends_in_errors(deployment, "raylet"):
        [raylet] = [p for p in ray_cluster.cluster_processes(deployment.port) if p.name() == "raylet"]
        raylet.kill()
