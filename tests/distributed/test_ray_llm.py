"""Replicas with Ray Serve LLM and Ray Data LLM, as docs/distributed.md has them, and other engines in Ray's groups."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import yaml
from oracle import expected
from ray_clusters import running_cluster
from serving import REPOSITORY, Server, free_port, server_environment, wait_until
from two_ranks import MODES, PROBLEMS, TRAINED, trained_params
from vllm.tokenizers import get_tokenizer

from vllm_twotower.reference import TwoTowerModel

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROWS = 64
START_SECONDS = 600  # of ten processes that import vLLM
READY = """\
ready = ray.data.read_json("models/tiny-twotower/heldout.jsonl").map(answer.preprocess).materialize()
answer.preprocess = None
answer(ready)"""
IN_GROUPS = """
import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from vllm_twotower.ray_devices import check_ray_devices

def check(*ranks):
    def answer(ranks):
        try:
            return check_ray_devices(ranks, patience=2)
        except ValueError as error:
            return str(error)
    return [answer(ranks) for ranks in ranks]

class Holder:
    def check(self, *ranks):
        return check(*ranks)

group = ray.util.placement_group([{"GPU": 1, "CPU": 1}] * 2)
ray.get(group.ready(), timeout=60)
inside = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)
print(check(1))
print(ray.get(ray.remote(check).options(num_gpus=0.001, scheduling_strategy=inside).remote(2, 3)))
print(ray.get(ray.remote(Holder).options(num_gpus=1, scheduling_strategy=inside).remote().check.remote(1, 2)))
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """The environment of programs that use a cluster with two devices, one after the other."""
    with running_cluster(2, **server_environment(), RAY_DEDUP_LOGS="0") as variables:
        yield os.environ | variables


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


class Reference:
    """The answers of the trained model's reference, as texts."""

    def __init__(self) -> None:
        self.model, self.tokenizer = TwoTowerModel.from_pretrained(TRAINED), get_tokenizer(str(TRAINED))

    def answer(self, prompt: str, mode: str = "mask_diffusion") -> str:
        tokens = expected(self.model, self.tokenizer.encode(prompt), trained_params(mode)).token_ids
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


def test_ray_data(cluster: dict[str, str], reference: Reference, tmp_path: Path) -> None:
    """The program of the documentation, with fewer prompts and in fp32; both replicas answer.

    Ray Data gives a batch to the replica that has the fewest. While batches come one by one, the first replica may
    have answered each before the next is there. So here the prompts are ready before both replicas are.
    """
    docs = (REPOSITORY / "docs/distributed.md").read_text()
    program = re.search(r"```python\n(import ray\n.*?)```", docs, re.DOTALL)[1]
    lines = (TRAINED / "heldout.jsonl").read_text().splitlines(keepends=True)[:ROWS]
    (tmp_path / "prompts.jsonl").write_text("".join(lines))
    for old, new in (
        ("config =", "ray.data.DataContext.get_current().wait_for_min_actors_s = 300\nconfig ="),
        ("engine_kwargs={", 'engine_kwargs={"dtype": "float32", '),
        ('answer(ray.data.read_json("models/tiny-twotower/heldout.jsonl"))', READY),
        ("models/tiny-twotower/heldout.jsonl", str(tmp_path / "prompts.jsonl")),
        ('"answers"', repr(str(tmp_path / "answers"))),
    ):
        assert old in program
        program = program.replace(old, new, 1)
    output = run(program, cluster)
    rows = [json.loads(line) for file in (tmp_path / "answers").iterdir() for line in file.read_text().splitlines()]
    want = {prompt: reference.answer(prompt) for prompt in (json.loads(line)["prompt"] for line in lines)}
    assert {row["prompt"]: row["answer"] for row in rows} == want
    assert len(set(re.findall(r"pid=(\d+)\).* Elapsed time for batch", output))) == 2, output[-5000:]


def test_groups(cluster: dict[str, str]) -> None:
    """Outside of a group whose devices nobody uses, in a task of it, and in an actor that has taken one of them."""
    refused = "tensor_parallel_size={} needs {} GPUs of the Ray {}, of which {} are free (of 2)"
    outside, task, actor = (eval(line) for line in run(IN_GROUPS, cluster).splitlines() if line.startswith("["))
    assert outside[0].startswith(refused.format(1, 1, "cluster", 0))
    assert task[0] is None
    assert task[1].startswith(refused.format(3, 3, "placement group", 2))
    assert actor[0] is None
    assert actor[1].startswith(refused.format(2, 2, "placement group", 1))


@pytest.fixture(scope="class")
def replicas(cluster: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`serve run` with the configuration that the documentation names, in fp32."""
    folder, port = tmp_path_factory.mktemp("serve"), free_port()
    config = yaml.safe_load((REPOSITORY / "configs/ray-replicas.yaml").read_text())
    config["http_options"]["port"] = port
    config["applications"][0]["args"]["llm_configs"][0]["engine_kwargs"]["dtype"] = "float32"
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    command = [str(Path(sys.executable).with_name("serve")), "run", str(folder / "config.yaml")]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, env=cluster, cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    server = Server(process, port, folder / "log", "tiny-twotower")
    try:
        wait_until(
            lambda: process.poll() is not None or server.log_text().count("Started vLLM engine.") == 2,
            "both engines run",
            START_SECONDS,
        )
        assert process.poll() is None, server.log_text()[-5000:]
        wait_until(lambda: ask(server, PROBLEMS[0], "ar") and len(answering(server)) == 2, "both replicas answer")
        yield server
    finally:
        server.stop()


class TestServe:
    """Two replicas behind one port."""

    def test_answers(self, replicas: Server, reference: Reference) -> None:
        """Whole and streamed."""
        asked = [(prompt, mode, stream) for prompt in PROBLEMS for mode in MODES for stream in (False, True)]
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda one: ask(replicas, *one), asked))
        assert answers == [reference.answer(prompt, mode) for prompt, mode, _ in asked]

    def test_refusals(self, replicas: Server) -> None:
        """Those of `vllm serve`; in a stream they come as its first event."""
        with pytest.raises(openai.BadRequestError, match="diffusion_mode='fast': must be one of"):
            ask(replicas, PROBLEMS[0], "fast")
        with pytest.raises(openai.APIError, match="diffusion_mode='fast': must be one of"):
            ask(replicas, PROBLEMS[0], "fast", stream=True)
        with pytest.raises(openai.NotFoundError):
            replicas.openai.completions.create(model="another", prompt="a")
        assert ask(replicas, PROBLEMS[0], "ar")


def answering(server: Server) -> set[str]:
    """The process ids of replicas that have answered."""
    return set(re.findall(r"LLMServer\S* pid=(\d+)\).* CALL completions OK", server.log_text()))


def ask(server: Server, prompt: str, mode: str, stream: bool = False) -> str:
    """The answer's text."""
    extra = {"vllm_xargs": {"diffusion_mode": mode}}
    answer = server.openai.completions.create(
        model=server.model, prompt=prompt, temperature=0, max_tokens=64, stream=stream, extra_body=extra
    )
    return "".join(chunk.choices[0].text for chunk in (answer if stream else [answer]))


def run(program: str, environment: dict[str, str]) -> str:
    """What a Python program prints."""
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-5000:]
    return result.stdout + result.stderr
