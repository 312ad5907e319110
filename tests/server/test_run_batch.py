"""`vllm run-batch`, the command as users type it: a file of chats in, a file of answers out."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import golden_data
from answers import Answer, assert_same, chat_arguments, expected_answers, of_chat
from serving import REPOSITORY, START_SECONDS, server_environment, vllm_command
from vllm.tokenizers import TokenizerLike

from vllm_twotower.reference import TwoTowerModel

TEXTS = ("Count to 10", "the end of a long sentence, and one more: ")
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}
OPTIONS = (
    GREEDY,
    {**GREEDY, "extra_args": {"diffusion_mode": "ar"}},
    {**GREEDY, "extra_args": {"diffusion_confidence_threshold": 0.5, "diffusion_canvas_length": 8}},
    {"temperature": 0.8, "max_tokens": 24, "seed": 5, "n": 2},
)
BAD = {
    "option": ({**GREEDY, "extra_args": {"diffusion_mode": "fast"}}, "diffusion_mode='fast': must be one of"),
    "sampling": ({**GREEDY, "temperature": -1}, "temperature must be non-negative"),
}


def line(custom_id: str, text: str, options: dict[str, Any], url: str = "/v1/chat/completions") -> str:
    arguments = chat_arguments(text, options)
    body = {"model": "batch", **arguments, **arguments.pop("extra_body")}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body}) + "\n"


def test_run_batch(oracle: TwoTowerModel, tokenizer: TokenizerLike, tmp_path: Path) -> None:
    """Lines that cannot be answered get their errors; the others get the oracle's tokens."""
    asked = {f"{number} {text}": (text, options) for number, options in enumerate(OPTIONS) for text in TEXTS}
    lines = [line(name, *request) for name, request in asked.items()]
    lines[2:2] = [line(name, TEXTS[0], options) for name, (options, _) in BAD.items()]
    lines += ["\n", line("url", TEXTS[0], GREEDY, "/v1/completions")]
    (tmp_path / "in.jsonl").write_text("".join(lines))
    command = vllm_command(
        "run-batch",
        *("-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")),
        *("--model", str(golden_data.checkpoint("A")), "--served-model-name", "batch", "--dtype", "float32"),
        *("--max-model-len", "1024", "--max-num-seqs", "8", "--kv-cache-memory-bytes", "64M"),
        *("--chat-template", "{% for message in messages %}{{ message.content }}{% endfor %}"),
    )
    process = subprocess.run(
        command, cwd=REPOSITORY, env=server_environment(), capture_output=True, text=True, timeout=START_SECONDS
    )
    assert process.returncode == 0, process.stdout + process.stderr
    answers = {one["custom_id"]: one for one in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())}
    assert set(answers) == {*asked, *BAD, "url"}

    for name, (_, words) in BAD.items():
        assert answers[name]["response"]["status_code"] == 400
        assert words in answers[name]["error"]["error"]["message"]
    assert "Supported endpoints: /v1/chat/completions" in answers["url"]["error"]

    for name, (text, options) in asked.items():
        choices = answers[name]["response"]["body"]["choices"]
        got = [chat_choice(choice) for choice in choices]
        assert_same(got, expected_answers(oracle, tokenizer, tokenizer.encode(text), options))


def chat_choice(choice: dict[str, Any]) -> Answer:
    """A choice of a chat in JSON."""
    return of_chat(SimpleNamespace(**{**choice, "message": SimpleNamespace(**choice["message"])}))
