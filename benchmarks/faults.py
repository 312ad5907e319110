"""Faults of a server with two ranks, many times each: is everybody told, does it end, is anything left?

    python benchmarks/faults.py --executor mp --times 20
    python benchmarks/faults.py --executor ray --times 10

Each time a server of the tiny model gets four endless requests, and then something happens to it. Its processes are
forked from one that has imported vLLM, which saves ten seconds a start. What was measured stays in the output file; a
second call goes on from there. The exit status is 1 if a fault was not survived, or not ended, as it must be.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

FORKER = "--fork-servers"


def fork_servers() -> None:
    """Imports vLLM; then starts a command of `vllm` for every line of JSON at its input, and writes its process id."""
    import setproctitle
    import vllm.entrypoints.cli.main as cli
    import vllm.entrypoints.openai.api_server
    import vllm.v1.engine.async_llm  # noqa: F401

    import vllm_twotower.engine.model_state
    import vllm_twotower.engine.scheduler
    import vllm_twotower.engine.worker  # noqa: F401

    setproctitle.getproctitle()  # finds its place while the environment is as it was
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        order = json.loads(line)
        if pid := os.fork():
            print(pid, flush=True)
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        output = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(order["environment"])
        sys.path[:0] = os.environ.get("PYTHONPATH", "").split(":")
        sys.argv = order["command"]
        cli.main()
        sys.exit(0)


if __name__ == "__main__" and sys.argv[1:] == [FORKER]:
    fork_servers()
    sys.exit(0)

import psutil  # noqa: E402
from deployments import (  # noqa: E402
    FAULT_SECONDS,
    PROMPT,
    Deployment,
    complete,
    endless_request,
    engine_of,
    over_processes,
    over_ray,
    runs,
    segments_of,
)
from ray_clusters import running_cluster  # noqa: E402
from serving import server_environment, wait_until  # noqa: E402
from stuck_rank import STUCK_FILE, STUCK_RANK  # noqa: E402

from vllm_twotower import ray_cluster  # noqa: E402

CLIENTS, VANISHING = 4, 200
EXECUTION_SECONDS = 5
"""The time that vLLM gives a step here, instead of five minutes."""


class Forked(psutil.Process):
    """A forked server, with what `subprocess.Popen` has and the tests' servers ask for."""

    def poll(self) -> int | None:
        return None if runs(self) else 0

    def wait(self, timeout: float | None = None) -> int:
        try:
            super().wait(timeout)
        except psutil.TimeoutExpired:
            raise subprocess.TimeoutExpired(str(self.pid), timeout) from None
        return 0


@contextmanager
def forker(cluster: Mapping[str, str]) -> Iterator[Callable[[Sequence[str], Path, Mapping[str, str]], Forked]]:
    """What starts servers quickly; Ray reads some of the cluster's variables when it is imported."""
    command = [sys.executable, __file__, FORKER]
    # The memory of a large request comes from the system, not from what a rank had before.
    environment = server_environment() | cluster | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:

        def start(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Forked:
            order = {"command": list(command), "log": str(log), "environment": dict(environment)}
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
            return Forked(int(process.stdout.readline()))

        yield start
        process.stdin.close()


@dataclass
class Fault:
    """What happens, and to what kind of server; ``survives``: only the clients are gone, and the server goes on."""

    name: str
    cause: Callable[[Deployment], None]
    executors: tuple[str, ...] = ("mp", "ray")
    options: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    survives: bool = False
    ends_cluster: bool = False


def raylet_of(deployment: Deployment) -> psutil.Process:
    [raylet] = [process for process in ray_cluster.cluster_processes(deployment.port) if process.name() == "raylet"]
    return raylet


def kill_while_waited_for(deployment: Deployment) -> None:
    Path(os.environ[STUCK_FILE]).touch()
    time.sleep(1)
    deployment.ranks()[1].kill()


def take_memory(deployment: Deployment) -> None:
    """The next large request needs memory that the rank does not get; somebody asks it."""
    deployment.ranks()[1].rlimit(psutil.RLIMIT_AS, (1 << 20, 1 << 20))
    large = {"prompt": [5] * 1500, "extra_body": {"prompt_logprobs": 1}}
    threading.Thread(target=lambda: _ignore(lambda: complete(deployment.server, **large)), daemon=True).start()


def vanish(deployment: Deployment) -> None:
    """Many clients that ask something, half of them for a stream, and close their connection."""
    connections = []
    for number in range(VANISHING):
        body = json.dumps(
            {"model": "served", "prompt": PROMPT, "max_tokens": 1500, "ignore_eos": True, "stream": number % 2 == 0}
        )
        connection = socket.create_connection(("127.0.0.1", deployment.server.port), timeout=30)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n{body}".encode())
        connections.append(connection)
    wait_until(lambda: deployment.server.metrics()["vllm:num_requests_running"] > CLIENTS, "some of them run")
    for connection in connections:
        connection.close()


def _ignore(action: Callable[[], object]) -> None:
    with suppress(Exception):
        action()


PATIENCE = {"VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": str(EXECUTION_SECONDS)}
WAITING = {STUCK_RANK: "0", "PYTHONPATH": str(ROOT / "tests")}
FAULTS = (
    Fault("rank 0 is killed", lambda one: one.ranks()[0].kill()),
    Fault("rank 1 is killed", lambda one: one.ranks()[1].kill()),
    Fault(
        "a rank is killed that another waits for",
        kill_while_waited_for,
        ("mp",),
        ("--worker-cls", "stuck_rank.StuckRank"),
        WAITING,
    ),
    Fault("a rank gets a SIGTERM", lambda one: one.ranks()[0].terminate()),
    Fault("a rank gets no memory", take_memory, ("mp",)),
    Fault("a rank is stopped (SIGSTOP)", lambda one: one.ranks()[1].suspend(), environment=PATIENCE),
    Fault("the engine's process is killed", lambda one: engine_of(one).kill()),
    Fault("the API server is killed", lambda one: one.server.process.kill()),
    Fault("the server gets a SIGTERM", lambda one: one.server.process.terminate()),
    Fault("the server gets a SIGINT", lambda one: one.server.process.send_signal(signal.SIGINT)),
    Fault(f"{VANISHING} clients vanish", vanish, survives=True),
    Fault("the raylet is killed", lambda one: raylet_of(one).kill(), ("ray",), ends_cluster=True),
)


@dataclass
class Outcome:
    """Seconds from the fault until all open requests were answered and until the server was gone, None: not in time.

    Of a server that survives they are the seconds until it is idle and until it has answered a request rightly. And
    what is left of it: processes, names of shared memory, its port.
    """

    executor: str
    fault: str
    answered: float | None
    gone: float | None
    processes: int
    shared_memory: int
    ports: int

    @property
    def is_good(self) -> bool:
        return None not in (self.answered, self.gone) and not (self.processes or self.shared_memory or self.ports)


def seconds_until(holds: Callable[[], bool], since: float) -> float | None:
    """None if it does not within `FAULT_SECONDS`."""
    while time.monotonic() - since < FAULT_SECONDS:
        if holds():
            return round(time.monotonic() - since, 2)
        time.sleep(0.02)
    return None


def try_once(fault: Fault, deployment: Deployment, executor: str) -> Outcome:
    """Causes the fault while requests run."""
    server, processes = deployment.server, deployment.processes()
    segments = {segment for process in processes for segment in segments_of(process)}
    errors: list[Exception] = []
    if fault.survives:
        expected = complete(server)
        since = time.monotonic()
        fault.cause(deployment)
        idle = seconds_until(lambda: not server.metrics()["vllm:num_requests_running"], since)
        right = seconds_until(lambda: complete(server) == expected, since)
        return Outcome(executor, fault.name, idle, right, 0, 0, 0)
    for number in range(CLIENTS):
        arguments = (replace(server), number % 2 == 0, errors)
        threading.Thread(target=endless_request, args=arguments, daemon=True).start()
    wait_until(lambda: server.metrics()["vllm:num_requests_running"] == CLIENTS, "the requests run")
    time.sleep(random.random() / 2)  # at any moment of a step
    since = time.monotonic()
    fault.cause(deployment)
    answered = seconds_until(lambda: len(errors) == CLIENTS, since)
    gone = seconds_until(lambda: not any(map(runs, processes)), since)
    seconds_until(lambda: not any(segment.exists() for segment in segments), time.monotonic() - FAULT_SECONDS + 5)
    return Outcome(
        executor,
        fault.name,
        answered,
        gone,
        sum(map(runs, processes)),
        sum(segment.exists() for segment in segments),
        _is_taken(server.port),
    )


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def run(args: argparse.Namespace, done: list[Outcome]) -> None:
    """Tries what is not done yet and appends it to the output file."""
    chosen = [fault for fault in FAULTS if args.executor in fault.executors and (args.only or "") in fault.name]
    plan = [
        (fault, number)
        for fault in chosen
        for number in range(sum(one.fault == fault.name for one in done), args.times)
    ]
    started = time.monotonic()
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        cluster: dict[str, str] = {}
        start = None
        clusters = stack.enter_context(ExitStack())
        for count, (fault, number) in enumerate(plan):
            if start is None:
                if args.executor == "ray":
                    cluster = clusters.enter_context(running_cluster(2))
                start = clusters.enter_context(forker(cluster))
            signal_file = Path(folder) / f"wait{count}"
            os.environ[STUCK_FILE] = str(signal_file)
            environment = {**cluster, **fault.environment, STUCK_FILE: str(signal_file)}
            log = Path(folder) / "log"
            over = over_ray(log, environment, *fault.options, starter=start) if cluster else None
            over = over or over_processes(log, *fault.options, environment=environment, starter=start)
            with over as deployment:
                outcome = try_once(fault, deployment, args.executor)
            done.append(outcome)
            with args.output.open("a") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")
            if not outcome.is_good:
                kept = args.output.with_suffix(f".{len(done)}.log")
                kept.write_bytes(log.read_bytes())
                print(f"  {outcome}\n  log: {kept}", flush=True)
            if fault.ends_cluster:
                clusters.close()
                start = None
            left = (time.monotonic() - started) / (count + 1) * (len(plan) - count - 1)
            figures = f"answered {outcome.answered} s, gone {outcome.gone} s"
            print(f"{fault.name} {number + 1}/{args.times}: {figures}; {left / 60:.0f} min left", flush=True)


def table(done: list[Outcome]) -> str:
    """One line a fault, in Markdown."""
    lines = [
        "| fault | executor | times | answered (s), median, longest | server gone (s), median, longest | left behind |",
        "|---|---|---|---|---|---|",
    ]
    for executor in ("mp", "ray"):
        for fault in FAULTS:
            mine = [one for one in done if (one.executor, one.fault) == (executor, fault.name)]
            if not mine:
                continue
            columns = []
            for name in ("answered", "gone"):
                seconds = [getattr(one, name) for one in mine]
                known = [value for value in seconds if value is not None]
                missing = f", {len(seconds) - len(known)} never" if len(known) < len(seconds) else ""
                columns.append(f"{statistics.median(known):.1f}, {max(known):.1f}{missing}" if known else "never")
            left = sum(one.processes + one.shared_memory + one.ports for one in mine)
            lines.append(f"| {fault.name} | {executor} | {len(mine)} | {columns[0]} | {columns[1]} | {left} |")
    return "\n".join(lines)


def main() -> int:
    """Runs the faults and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--executor", choices=("mp", "ray"), default="mp")
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--only", metavar="WORDS", help="faults whose names have these words")
    parser.add_argument("--output", type=Path, default=ROOT / "runs/faults.jsonl", help="default: %(default)s")
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    lines = args.output.read_text().splitlines() if args.output.exists() else []
    done = [Outcome(**json.loads(line)) for line in lines]
    others = [one for one in done if one.executor != args.executor]
    mine = [one for one in done if one.executor == args.executor]
    run(args, mine)
    print(table(others + mine))
    return not all(one.is_good for one in mine)


if __name__ == "__main__":
    sys.exit(main())
