"""What `vllm-twotower watch` says of servers that do not answer as they should."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from watch_traces import block_chunk

from vllm_twotower.watch.recording import Chunk
from vllm_twotower.watch.sources import ServerSource, WatchError, ahead

MODELS = {"/v1/models": (200, b'{"data": [{"id": "served"}]}')}


@pytest.fixture
def answers() -> Iterator[dict[str, tuple[int, bytes]]]:
    """What a server answers, by path; under "url" is where it is."""
    found: dict = dict(MODELS)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = found.get(self.path, (404, b'{"detail": "Not Found"}'))
            self.send_response(status)
            if body.endswith(b"broken"):
                self.send_header("Transfer-Encoding", "chunked")
                body = b"fff\r\n" + body
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            found["asked"] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    found["url"] = f"127.0.0.1:{server.server_port}"
    yield found
    server.shutdown()
    server.server_close()


def chunks(answers: dict) -> list[Chunk]:
    source = ServerSource(answers["url"], None)
    return list(ahead(source.chunks("A prompt", {"diffusion_trace": "passes"}, max_tokens=3)))


def stream(*choices: dict) -> bytes:
    return b"".join(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n" for choice in choices)


def test_chunks_of_a_stream(answers: dict) -> None:
    block = block_chunk(0.1, 0, [[5, 3], [5, 6]], [0.9, 0.8])
    sent = {"text": "", "token_ids": block.token_ids, "diffusion_trace": block.trace.to_json()}
    answers["/v1/completions"] = 200, stream(sent, {"text": "", "token_ids": None}) + b"data: [DONE]\n\n"
    [found] = chunks(answers)
    assert (found.token_ids, found.trace.to_json()) == (block.token_ids, block.trace.to_json())
    assert found.seconds > 0
    asked = answers["asked"]
    assert (asked["model"], asked["stream"], asked["return_token_ids"]) == ("served", True, True)
    assert asked["vllm_xargs"] == {"diffusion_trace": "passes"}
    answers["/detokenize"] = 200, b'{"prompt": " text"}'
    assert ServerSource(answers["url"], "served").decode([5, 6]) == " text"


@pytest.mark.parametrize(
    ("path", "status", "body", "words"),
    [
        ("/v1/models", 200, b"<html>", "not as vLLM does"),
        ("/v1/models", 200, b"[]", "not as vLLM does"),
        ("/v1/models", 401, b'{"error": {"message": "Unauthorized"}}', "HTTP 401: Unauthorized"),
        ("/v1/completions", 404, b'{"detail": "Not Found"}', "HTTP 404: Not Found"),
        ("/v1/completions", 200, b'data: {"error": {"message": "it failed"}}\n\n', "it failed"),
        ("/v1/completions", 200, stream({"text": "a", "token_ids": [5]}), "no trace came"),
        ("/v1/completions", 200, b"broken", "broke off"),
        ("/v1/completions", 200, b"", "broke off"),
    ],
)
def test_what_goes_wrong_is_told_in_words(answers: dict, path: str, status: int, body: bytes, words: str) -> None:
    answers[path] = status, body
    with pytest.raises(WatchError, match=words):
        chunks(answers)


def test_a_chunk_is_read_while_another_is_looked_at() -> None:
    read = []

    def source() -> Iterator[int]:
        for i in range(3):
            read.append(i)
            yield i

    found = ahead(source())
    assert next(found) == 0
    found.close()
    assert set(read) <= {0, 1, 2}
