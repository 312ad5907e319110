"""A soak: many random requests at once to a small server, then each of them alone; what must be the same and be free.

Everything that happens is kept as lines of JSON, so that a soak that was interrupted goes on.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import httpx
import psutil
from answers import answers_in, choices_in, completion_body
from random_requests import RandomRequest
from serving import REQUEST_SECONDS, Server, wait_until
from soak_answers import Answers, RoundingJudge, as_json, compare
from soak_requests import IS_BAD, MAX_MODEL_LEN, Asked, draw_asked
from tqdm import tqdm

ANSWERED, LEFT, REFUSED, FAILED = "answered", "left", "refused", "failed"
OCCUPANCY = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
COUNTERS = {
    "preemptions": "vllm:num_preemptions_total",
    "prompt tokens": "vllm:prompt_tokens_total",
    "prompt tokens found in the prefix cache": "vllm:prefix_cache_hits_total",
    "generated tokens": "vllm:generation_tokens_total",
    "auto: blocks token by token": "vllm:twotower_num_auto_ar_choices_total",
    "auto: blocks by mask diffusion": "vllm:twotower_num_auto_diffusion_choices_total",
}
MUST_HAPPEN = ("preemptions", "prompt tokens found in the prefix cache")
SECONDS_PER_SAMPLE = 2.0

SMALL = ("--dtype", "float32", "--max-model-len", str(MAX_MODEL_LEN))
UNDER_LOAD = (*SMALL, "--max-num-seqs", "16", "--max-num-batched-tokens", "384")
UNDER_LOAD += ("--kv-cache-memory-bytes", str(40 * (64 << 10)), "--prefix-cache-retention-interval", "128")
"""Options of a server of checkpoint A with 40 pages, too few for its 16 requests."""
ENVIRONMENT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
"""Of the server under load: oneDNN's cache of kernels, one for each number of tokens, is full soon, not at 1024."""
ALONE = (*SMALL, "--max-num-seqs", "1", "--no-enable-prefix-caching", "--kv-cache-memory-bytes", "64M")
"""Options of a server that runs one request at a time."""

Record = dict[str, Any]


class Journal:
    """A file of what happened: the settings, then a line for every request in either phase and every sample."""

    def __init__(self, path: Path, settings: Record):
        """Goes on with the file if there is one; ValueError if it was written with other settings."""
        self.samples: list[Record] = []
        self.compared: dict[int, Record] = {}
        self.faults: list[str] = []
        self._loaded: dict[int, str] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        # The last line may have been cut.
        lines = [x for x in path.read_text().splitlines(keepends=True) if x.endswith("\n")] if path.exists() else []
        if lines and json.loads(lines[0]) != settings:
            raise ValueError(f"{path} was written with {lines[0].strip()}, not {json.dumps(settings)}")
        path.write_text("".join(lines or [json.dumps(settings) + "\n"]))
        self._file = path.open("a")
        for line in lines[1:]:
            self._keep(line)

    def add(self, kind: str, **record: Any) -> None:
        """Appends a record: ``sample``, ``load``, ``alone`` or ``faults``."""
        line = json.dumps({"kind": kind, **record}) + "\n"
        self._file.write(line)
        self._file.flush()
        self._keep(line)

    def _keep(self, line: str) -> None:
        record = json.loads(line)
        if record["kind"] == "sample":
            self.samples.append(record)
        elif record["kind"] == "load":
            self._loaded[record["index"]] = line  # text is smaller than objects
        elif record["kind"] == "alone":
            self.compared[record["index"]] = record
        else:
            self.faults += record["faults"]

    def asked(self) -> set[int]:
        """The indices of the requests that were asked under load."""
        return set(self._loaded)

    def outcome(self, index: int) -> Record:
        return json.loads(self._loaded[index])


# Under load


async def load(server: Server, seed: int, indices: Sequence[int], journal: Journal, at_once: int) -> None:
    """Asks all that was not asked yet, ``at_once`` at any time, and watches the server's memory and counters."""
    to_ask = [index for index in indices if index not in journal.asked()]
    num_ended = 0

    async def sample() -> None:
        values, memory = await asyncio.to_thread(lambda: (server.metrics(), resident_memory(server)))
        counters = {name: int(values.get(metric, 0)) for name, metric in COUNTERS.items()}
        journal.add("sample", server=server.process.pid, ended=num_ended, memory=memory, counters=counters)

    async def watch() -> None:
        while True:
            await sample()
            await asyncio.sleep(SECONDS_PER_SAMPLE)

    async with _client(at_once) as client:

        async def use(index: int) -> None:
            nonlocal num_ended
            asked = draw_asked(seed, index)
            journal.add("load", index=index, **await _outcome(client, server, asked))
            num_ended += 1

        watching = asyncio.create_task(watch())
        await _each(to_ask, at_once, "under load", use)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    await sample()


async def _outcome(client: httpx.AsyncClient, server: Server, asked: Asked) -> Record:
    body = asked.body
    try:
        async with asyncio.timeout(asked.patience):
            response = await _post(client, server, body)
            if asked.follow_up is not None and _is_answer(response):
                [choice] = _answers(response, body)["choices"]
                body = {**body, "prompt": body["prompt"] + choice["token_ids"] + asked.follow_up}
                response = await _post(client, server, body)
    except TimeoutError:
        return {"outcome": LEFT}
    except httpx.HTTPError as error:
        assert await asyncio.to_thread(server.answers), "the server is gone"
        return {"outcome": FAILED, "why": repr(error)}
    if asked.client == IS_BAD:
        if response.status_code == 400 and all(word in response.json()["error"]["message"] for word in asked.words):
            return {"outcome": REFUSED}
    elif _is_answer(response):
        return {"outcome": ANSWERED, "prompt": body["prompt"], "answers": _answers(response, body)}
    return {"outcome": FAILED, "why": f"status {response.status_code}: {response.text[:1000]}"}


def _is_answer(response: httpx.Response) -> bool:
    return response.status_code == 200 and 'data: {"error"' not in response.text


def _answers(response: httpx.Response, body: dict[str, Any]) -> Answers:
    is_stream = bool(body.get("stream"))
    prompt_logprobs = None if is_stream else choices_in(response.text)[0].prompt_logprobs
    return as_json(answers_in(response.text, is_stream), prompt_logprobs)


def _client(at_once: int) -> httpx.AsyncClient:
    """A client that takes a connection for each request: the server closes one that it has not used for 5 seconds."""
    limits = httpx.Limits(max_connections=at_once, max_keepalive_connections=0)
    return httpx.AsyncClient(timeout=REQUEST_SECONDS, limits=limits)


async def _post(client: httpx.AsyncClient, server: Server, body: dict[str, Any]) -> httpx.Response:
    return await client.post(f"{server.url}/v1/completions", json={"model": server.model, **body})


async def _each(indices: Sequence[int], at_once: int, what: str, use: Callable[[int], Awaitable[None]]) -> None:
    """Uses all indices in order, ``at_once`` at any time."""
    waiting = iter(indices)
    with tqdm(total=len(indices), desc=what, unit=" requests", mininterval=1) as progress:

        async def use_in_turn() -> None:
            for index in waiting:
                await use(index)
                progress.update()

        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(use_in_turn())


def resident_memory(server: Server) -> dict[str, int]:
    """Bytes of the API server's process and of the engine's."""
    api = psutil.Process(server.process.pid)
    [engine] = [child for child in api.children(recursive=True) if "EngineCore" in " ".join(child.cmdline())]
    return {"API server": api.memory_info().rss, "engine": engine.memory_info().rss}


@contextmanager
def faults_of(server: Server) -> Iterator[list[str]]:
    """A list that after the block has what is wrong with the server: what is left of requests, errors in its log."""
    log_start, faults = len(server.log_text()), []
    yield faults
    try:
        wait_until(lambda: not any(server.metrics()[name] for name in OCCUPANCY), "idle", seconds=30)
    except AssertionError:
        values = server.metrics()
        faults += [f"{name} is {values[name]:g} at the end" for name in OCCUPANCY if values[name]]
    log = server.log_text()[log_start:]
    faults += [f"the server's log has {word!r}" for word in ("Traceback", " ERROR ") if word in log]


# Alone


async def compare_alone(
    servers: Sequence[Server], seed: int, indices: Sequence[int], journal: Journal, at_once: int = 1
) -> None:
    """Asks all that was answered under load once more, of servers without load, and compares the answers.

    ``at_once`` requests are sent to each of the servers, more than one only to servers that run one at a time. Nothing
    is streamed here.
    """
    to_ask = [i for i in indices if i not in journal.compared and journal.outcome(i)["outcome"] == ANSWERED]
    async with _client(at_once * len(servers)) as client:

        async def check(index: int) -> None:
            async def ask(request: RandomRequest) -> Answers:
                body = completion_body(request.prompt, request.options)
                response = await _post(client, servers[index % len(servers)], body)
                assert response.status_code == 200, response.text
                return _answers(response, body)

            record = journal.outcome(index)
            request = RandomRequest(record["prompt"], draw_asked(seed, index).request.options)
            comparison, want = await compare(request, record["answers"], ask)
            shown = {"alone": want} if comparison.different else {}
            journal.add("alone", index=index, **asdict(comparison), **shown)

        await _each(to_ask, at_once * len(servers), "alone", check)


# What came out


def summarize(seed: int, indices: Sequence[int], journal: Journal, judge: RoundingJudge) -> Record:
    """The figures of a soak; ``faults`` are what is wrong with the answers and with what the server was left in."""
    faults, ties = list(journal.faults), 0
    outcomes = {index: journal.outcome(index) for index in indices}
    compared = {index: journal.compared[index] for index in indices if index in journal.compared}
    for index, record in outcomes.items():
        if record["outcome"] == FAILED:
            faults.append(f"request {index}: {record['why']}")
    for index, comparison in compared.items():
        if comparison["different"]:
            request = RandomRequest(outcomes[index]["prompt"], draw_asked(seed, index).request.options)
            both = (outcomes[index]["answers"], comparison["alone"])
            is_of_choices = "prompt_logprobs" not in comparison["different"]
            if is_of_choices and all(
                asyncio.run(judge.explains(request, answers)) for answers in both if answers is not None
            ):
                ties += 1
            else:
                faults.append(f"request {index}: not as alone: {', '.join(comparison['different'])}")
    last_of_each_server = {sample["server"]: sample for sample in journal.samples}.values()
    counted = {name: sum(sample["counters"][name] for sample in last_of_each_server) for name in COUNTERS}
    return {
        "requests": len(indices),
        **Counter(record["outcome"] for record in outcomes.values()),
        "compared": len(compared),
        "different by rounding": ties,
        "listed tokens swapped by rounding": sum(x["swapped"] for x in compared.values()),
        "largest difference of log-probabilities": max((x["largest"] for x in compared.values()), default=0.0),
        **counted,
        "memory": memory_growth(journal.samples),
        "faults": faults,
    }


def memory_growth(samples: Sequence[Record]) -> dict[str, tuple[float, float]]:
    """Mean resident MiB of the newest server's processes in the second tenth of its requests and in the last one."""
    newest = [sample for sample in samples if sample["server"] == samples[-1]["server"]]
    total = newest[-1]["ended"]
    tenths = [
        [x["memory"] for x in newest if low <= x["ended"] / total <= high] for low, high in ((0.1, 0.2), (0.9, 1))
    ]
    if not all(tenths):
        return {}
    return {name: tuple(mean(x[name] for x in tenth) / 2**20 for tenth in tenths) for name in newest[-1]["memory"]}
