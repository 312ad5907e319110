"""A real `vllm serve` process: started, watched, asked, stopped with everything it started."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import openai
from prometheus_client.parser import text_string_to_metric_families

REPOSITORY = Path(__file__).parents[1]
START_SECONDS = 240
REQUEST_SECONDS = 120
LOG_TAIL = 60


def printed_by(script: str, *arguments: str) -> Any:
    """What a script of tests/ prints last, a line of JSON; in a process of its own, whose platform it may replace."""
    command = [sys.executable, str(Path(__file__).parent / script), *arguments]
    done = subprocess.run(command, env=server_environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def server_environment() -> dict[str, str]:
    """This process's environment without what other tests set for engines of their own; loopback, one thread.

    A server's processes are forked, so that only the first imports vLLM.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    return inherited | {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_WORKER_MULTIPROC_METHOD": "fork",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def vllm_command(*arguments: str) -> list[str]:
    """A command line of `vllm`, as a user types it."""
    return [str(Path(sys.executable).with_name("vllm")), *arguments]


def vllm_serve(model: str | Path, port: int, *options: str) -> list[str]:
    """The command line of `vllm serve` at a port of 127.0.0.1."""
    return vllm_command("serve", str(model), "--host", "127.0.0.1", "--port", str(port), *options)


def wait_until(holds: Callable[[], bool], what: str, seconds: float = 60) -> None:
    """Polls until ``holds()``; fails after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"after {seconds:g} s still not: {what}"
        time.sleep(0.05)


@dataclass
class Server:
    """A running server, which calls its model ``model``."""

    process: subprocess.Popen
    port: int
    log: Path
    model: str = "served"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @cached_property
    def openai(self) -> openai.OpenAI:
        """OpenAI's client; it does not try again, so that every failure shows."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=REQUEST_SECONDS)

    def async_openai(self) -> openai.AsyncOpenAI:
        """OpenAI's client for one event loop."""
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=REQUEST_SECONDS)

    def post(self, path: str, **body: Any) -> httpx.Response:
        """A plain POST of a JSON body."""
        return httpx.post(self.url + path, json={"model": self.model, **body}, timeout=REQUEST_SECONDS)

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def metrics(self) -> dict[str, float]:
        """The samples of `/metrics` by name, summed over their labels."""
        totals: dict[str, float] = {}
        for family in text_string_to_metric_families(httpx.get(f"{self.url}/metrics", timeout=REQUEST_SECONDS).text):
            for sample in family.samples:
                totals[sample.name] = totals.get(sample.name, 0) + sample.value
        return totals

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def stop(self) -> int:
        """Asks the server to stop as Ctrl-C does, then ends whatever is left of its process group; its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self.process.kill()
        status = self.process.wait(timeout=60)
        # Python's process that frees shared memory ends after the last of those that it frees it for.
        deadline = time.monotonic() + 5
        with suppress(ProcessLookupError):
            while time.monotonic() < deadline:
                os.killpg(self.process.pid, 0)
                time.sleep(0.05)
            os.killpg(self.process.pid, signal.SIGKILL)
        return status


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen:
    """A process in a group of its own, whose output goes to ``log``."""
    with log.open("wb") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=REPOSITORY, env=environment, start_new_session=True
        )


@contextmanager
def running_server(
    model: str | Path,
    log: Path,
    *options: str,
    name: str = "served",
    environment: Mapping[str, str] | None = None,
    starter: Callable[[Sequence[str], Path, Mapping[str, str]], subprocess.Popen] = start,
) -> Iterator[Server]:
    """`vllm serve` on a free port of 127.0.0.1, ready for requests; its output goes to ``log``."""
    port = free_port()
    command = vllm_serve(model, port, "--served-model-name", name, *options)
    server = Server(starter(command, log, server_environment() | (environment or {})), port, log, name)
    process = server.process
    try:
        wait_until(lambda: process.poll() is not None or server.answers(), "server answers", START_SECONDS)
        assert process.poll() is None, f"exit status {process.returncode}"
        yield server
    except AssertionError as error:
        tail = "\n".join(server.log_text().splitlines()[-LOG_TAIL:])
        error.add_note(f"{' '.join(command)}\n{log}, the last lines:\n{tail}")
        raise
    finally:
        server.stop()


def refused_start(
    model: str | Path, log: Path, *options: str, environment: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Exit status and output of a `vllm serve` that must not come up."""
    command = vllm_serve(model, free_port(), *options)
    server = Server(start(command, log, server_environment() | (environment or {})), 0, log)
    try:
        server.process.wait(timeout=START_SECONDS)
    finally:
        status = server.stop()
    return status, server.log_text()


def token_request(prompt: Sequence[int], max_tokens: int, **options: Any) -> dict[str, Any]:
    """Arguments of ``completions.create`` for a greedy request in token ids; ``options`` are `diffusion_*` options."""
    return {
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
        "extra_body": {"ignore_eos": True, "return_token_ids": True, "vllm_xargs": options},
    }
