"""Servers of several processes without Ray: faults of ranks, and independent replicas."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from deployments import FAULT_SECONDS, KILLED_RANK, TINY, complete, ends_in_errors, engine_of, over_processes, runs
from prometheus_client.parser import text_string_to_metric_families
from serving import REPOSITORY, running_server, server_environment, wait_until
from stuck_rank import STUCK_FILE, STUCK_RANK


def test_killed_rank(tmp_path: Path) -> None:
    with over_processes(tmp_path / "log") as deployment, ends_in_errors(deployment, KILLED_RANK):
        deployment.ranks()[1].kill()


def test_killed_rank_that_another_waits_for(tmp_path: Path) -> None:
    """Where nothing tells the other rank, as in a sum over shared memory; it does not notice a SIGTERM either."""
    signal_file = tmp_path / "wait"
    environment = {STUCK_RANK: "0", STUCK_FILE: str(signal_file), "PYTHONPATH": str(REPOSITORY / "tests")}
    with over_processes(
        tmp_path / "log", "--worker-cls", "stuck_rank.StuckRank", environment=environment
    ) as deployment:
        with ends_in_errors(deployment, "Another rank has ended"):
            signal_file.touch()
            time.sleep(1)
            deployment.ranks()[1].kill()
        assert "API server: shutdown triggered" not in deployment.server.log_text()


def test_a_signal_for_a_rank_is_not_the_servers(tmp_path: Path) -> None:
    """A forked process inherits what its parent's event loop reads signals from."""
    with over_processes(tmp_path / "log") as deployment:
        with ends_in_errors(deployment, "died unexpectedly"):
            deployment.ranks()[0].terminate()
        assert "API server: shutdown triggered" not in deployment.server.log_text()


def test_killed_api_server(tmp_path: Path) -> None:
    """Its engine and ranks end, and with them its port is free."""
    with over_processes(tmp_path / "log") as deployment:
        processes = deployment.processes()
        deployment.server.process.kill()
        wait_until(lambda: not any(map(runs, processes)), "all processes have ended", FAULT_SECONDS)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", deployment.server.port))


def test_killed_engine_of_a_stopped_rank(tmp_path: Path) -> None:
    """Nobody is left who would end a rank that hangs or is stopped."""
    with over_processes(tmp_path / "log") as deployment:
        processes = deployment.processes()
        deployment.ranks()[1].suspend()
        engine_of(deployment).kill()
        wait_until(lambda: not any(map(runs, processes)), "all processes have ended", FAULT_SECONDS)


def test_killed_engine_of_a_batch() -> None:
    """``LLM.generate`` ends in an error, too."""
    command = [sys.executable, str(REPOSITORY / "tests/killed_engine.py"), str(TINY)]
    result = subprocess.run(command, env=server_environment(), capture_output=True, text=True, timeout=120)
    assert "EngineDeadError" in result.stderr, result.stderr


@pytest.mark.slow
def test_rank_without_memory(tmp_path: Path) -> None:
    """An error in a rank whose results nobody reads; ranks that are bound to cores, as they are without settings."""
    words = "Rank 1 failed and ends, and the engine with it"
    environment = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    # So that the memory of a large request comes from the system, not from what the rank had before.
    environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    with over_processes(tmp_path / "log", environment=environment) as deployment, ends_in_errors(deployment, words):
        deployment.ranks()[1].rlimit(psutil.RLIMIT_AS, (1 << 20, 1 << 20))
        with pytest.raises(openai.APIError):
            complete(deployment.server, prompt=[5] * 1500, extra_body={"prompt_logprobs": 1})


def test_replicas_without_experts(tmp_path: Path) -> None:
    """Two engines behind one port share the requests and answer as one does."""
    config = str(REPOSITORY / "configs/tiny-cpu.yaml")
    options = ("--config", config, "--data-parallel-size", "2", "--api-server-count", "1")
    environment = {"VLLM_CPU_SIM_MULTI_NUMA": "0"}  # since vLLM 0.33 each wants a NUMA node of its own
    with running_server(TINY, tmp_path / "log", *options, environment=environment) as server:
        answers: set[str] = set()

        def both_have_answered() -> bool:
            with ThreadPoolExecutor(8) as pool:
                answers.update(pool.map(lambda _: complete(server), range(8)))
            families = text_string_to_metric_families(httpx.get(f"{server.url}/metrics", timeout=30).text)
            [tokens] = [
                {sample.labels["engine"]: sample.value for sample in family.samples if sample.name.endswith("_total")}
                for family in families
                if family.name == "vllm:generation_tokens"
            ]
            assert set(tokens) == {"0", "1"}
            return all(tokens.values())

        wait_until(both_have_answered, "both engines have answered")
        assert len(answers) == 1
        assert answers.pop().strip()
