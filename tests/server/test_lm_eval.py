"""The shipped configurations of lm-eval, by the real lm-eval, with tests/lm_eval/ in the place of the data sets.

A data set or metric is looked for as a folder first, so the standard tasks run unchanged where such folders lie.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import REPOSITORY, REQUEST_SECONDS, Server, free_port, running_server, server_environment
from vllm.tokenizers import get_tokenizer

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.slow

CONFIGS = REPOSITORY / "configs/lm-eval"
FILES = REPOSITORY / "tests/lm_eval"
TINY = REPOSITORY / "models/tiny-twotower"
RUN_SECONDS = 400
HUMANEVAL_STOPS = ["\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n@"]


@dataclass(frozen=True)
class Expected:
    """What a configuration must ask and report.

    ``marker`` stands once in every example and in the question; ``task`` is one of the configuration's 57.
    """

    shots: int
    documents: int
    metrics: tuple[str, ...]
    marker: str
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    task: str = ""


GSM8K = ("exact_match,strict-match", "exact_match,flexible-extract")
END = ("</s>", "<|im_end|>")
EXPECTED = {
    "gsm8k": Expected(4, 3, GSM8K, "Question:", stop=("Question:", *END)),
    "gsm8k_cot": Expected(8, 3, GSM8K, "Q:", stop=("Q:", *END)),
    "humaneval": Expected(0, 2, ("pass@1,create_test",), "def ", 1024, tuple(HUMANEVAL_STOPS)),
    "mbpp": Expected(3, 2, ("pass_at_1,none",), "[BEGIN]", stop=("[DONE]",)),
    "mbpp_sanitized": Expected(3, 2, ("pass_at_1,none",), "[BEGIN]", stop=("[DONE]",)),
    "mmlu": Expected(5, 3, ("acc,none",), "Answer:", 1, task="mmlu_anatomy"),
}


@dataclass
class Recorder:
    """Passes every request on to a server, and keeps the completions that were asked for, with their status."""

    server: Server
    port: int = field(default_factory=free_port)
    asked: list[tuple[dict[str, Any], int]] = field(default_factory=list)

    @contextmanager
    def running(self) -> Iterator[Recorder]:
        recorder, client = self, httpx.Client(base_url=self.server.url, timeout=REQUEST_SECONDS)
        client.headers["Content-Type"] = "application/json"

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def pass_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                answer = client.request(self.command, self.path, content=body)
                if self.path == "/v1/completions":
                    recorder.asked.append((json.loads(body), answer.status_code))
                self.send_response(answer.status_code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer.content)))
                self.end_headers()
                self.wfile.write(answer.content)

            do_GET = do_POST = pass_on

            def log_message(self, *_: Any) -> None: ...

        class Proxy(ThreadingHTTPServer):
            request_queue_size = 64

        proxy = Proxy(("127.0.0.1", self.port), Handler)
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        try:
            yield self
        finally:
            proxy.shutdown()
            proxy.server_close()
            client.close()


@dataclass
class Run:
    """What lm-eval wrote, and what it asked."""

    results: dict[str, Any]
    samples: list[dict[str, Any]]
    asked: list[tuple[dict[str, Any], int]]


def run_lm_eval(name: str, server: Server, folder: Path) -> Run:
    """`lm-eval run` with a shipped configuration, of which only the port is another."""
    with Recorder(server).running() as recorder:
        config = (CONFIGS / f"{name}.yaml").read_text()
        assert config.count("127.0.0.1:8000/") == 1
        (folder / f"{name}.yaml").write_text(config.replace("127.0.0.1:8000/", f"127.0.0.1:{recorder.port}/"))
        lm_eval = str(Path(sys.executable).with_name("lm-eval"))
        command = [lm_eval, "run", "--config", f"{name}.yaml", "--confirm_run_unsafe_code"]
        command += ["--tasks", EXPECTED[name].task or name]
        variables = {"HF_ALLOW_CODE_EVAL": "1", "HF_HOME": str(folder / "hf"), "OPENAI_API_KEY": ""}
        environment = server_environment() | variables
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=RUN_SECONDS)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    written = folder / "runs/lm-eval" / name
    [results] = written.rglob("results_*.json")
    lines = [line for path in sorted(written.rglob("samples_*.jsonl")) for line in path.read_text().splitlines()]
    return Run(json.loads(results.read_text()), [json.loads(line) for line in lines], recorder.asked)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Run]]:
    """All configurations, two at a time: a server and lm-eval both need time to start."""
    folder = tmp_path_factory.mktemp("lm-eval")
    for path in (*FILES.iterdir(), REPOSITORY / "configs"):
        (folder / path.name).symlink_to(path)
    options = ("--config", "configs/tiny-cpu.yaml", "--enable-tokenizer-info-endpoint")
    with (
        running_server(
            TINY, folder / "server.log", *options, name="twotower", environment={"VLLM_MAX_STOP_STRINGS": "8"}
        ) as server,
        ThreadPoolExecutor(2) as pool,
    ):
        futures = {name: pool.submit(run_lm_eval, name, server, folder) for name in reversed(EXPECTED)}
        yield {name: future.result() for name, future in futures.items()}


def test_every_configuration_is_tried() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_reports_its_metrics(runs: dict[str, Run], name: str) -> None:
    expected, run = EXPECTED[name], runs[name]
    scores = run.results["results"][expected.task or name]
    assert {metric for metric in scores if "," in metric and "stderr" not in metric} == set(expected.metrics)
    assert set(run.results["n-shot"].values()) == {expected.shots}
    for metric in expected.metrics:
        plain, chosen = metric.split(",")
        values = [sample[plain] for sample in run.samples if sample["filter"] == chosen]
        assert len(values) == expected.documents
        assert scores[metric] == pytest.approx(sum(values) / len(values))


@pytest.mark.parametrize("name", [name for name in EXPECTED if name != "mmlu"])
def test_asks_for_blocks_as_the_configuration_says(runs: dict[str, Run], name: str) -> None:
    expected, run = EXPECTED[name], runs[name]
    assert [status for _, status in run.asked] == [200] * expected.documents
    for body, _ in run.asked:
        assert body.pop("prompt").count(expected.marker) == expected.shots + 1
        assert set(body.pop("stop")) == set(expected.stop)
        assert body == {
            "model": "twotower",
            "max_tokens": expected.max_tokens,
            "temperature": 0.1,
            "seed": 1234,
            "vllm_xargs": {"diffusion_mode": "mask_diffusion", "diffusion_confidence_threshold": 0.8},
        }
    for sample in run.samples:
        [[answer]] = sample["resps"]
        assert not any(stop in answer for stop in expected.stop)


def test_asks_for_likelihoods(runs: dict[str, Run]) -> None:
    expected, run, tokenizer = EXPECTED["mmlu"], runs["mmlu"], get_tokenizer(TINY)
    assert [status for _, status in run.asked] == [200] * 4 * expected.documents
    for body, _ in run.asked:
        [token_ids] = body.pop("prompt")
        text = tokenizer.decode(token_ids)
        assert text.count(expected.marker) == expected.shots + 1
        assert text[-2:] in (" A", " B", " C", " D")
        likelihood = {"max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
        assert body == {"model": "twotower", "seed": 1234, **likelihood}


def test_the_files_and_their_metric_agree() -> None:
    """The answers beside the problems pass their tests, and no answer does not."""
    spec = importlib.util.spec_from_file_location("code_eval", FILES / "code_eval/code_eval.py")
    code_eval = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(code_eval)
    for line in (FILES / "openai/openai_humaneval/test.jsonl").read_text().splitlines():
        row = json.loads(line)
        tests = f"\n{row['test']}\ncheck({row['entry_point']})"
        assert code_eval.passes(row["prompt"] + row["canonical_solution"] + tests)
        assert not code_eval.passes(row["prompt"] + "    return None\n" + tests)
    for path in (FILES / "google-research-datasets/mbpp").glob("*.jsonl"):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            assert code_eval.passes("\n".join([row["code"], *row["test_list"]]))
            assert not code_eval.passes("\n".join(row["test_list"]))
    assert [code_eval.pass_at(k, 2, 4) for k in (1, 3)] == [0.5, 1]
