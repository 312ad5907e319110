"""Where recordings come from: an engine in this process, or a server."""

from __future__ import annotations

import http.client
import json
import os
import queue
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from vllm_twotower.models import embedded_model
from vllm_twotower.offline import logged_to, small_engine
from vllm_twotower.trace import TRACE, DiffusionTrace
from vllm_twotower.watch.recording import Chunk

Chunks = Generator[Chunk, None, None]
SECONDS_TO_ANSWER = 600
SECONDS_TO_STOP = 3


class WatchError(Exception):
    """Something that ends the command, in words for its user."""


class Source(Protocol):
    """What answers requests: its model's name, the text of token ids, and the chunks of a request."""

    model: str

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        ...

    def chunks(self, prompt: str, options: dict[str, Any], **sampling: Any) -> Chunks:
        """Sends a request with ``diffusion_*`` options, and gives what comes, when it comes."""
        ...


class OfflineSource(Source):
    """An engine in this process, which therefore has no processes that could outlive it."""

    def __init__(self, llm: Any, model: str):
        self.model = model
        self._llm = llm
        self._tokenizer = llm.get_tokenizer()
        self._requests = 0

    def decode(self, token_ids: Sequence[int]) -> str:
        """See :class:`Source`."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=False)

    def chunks(self, prompt: str, options: dict[str, Any], **sampling: Any) -> Chunks:
        """See :class:`Source`; the engine stands still until the next chunk is asked for."""
        from vllm import SamplingParams
        from vllm.exceptions import VLLMValidationError
        from vllm.sampling_params import RequestOutputKind

        engine = self._llm.llm_engine
        self._requests += 1
        name = f"watch-{self._requests}"
        start = time.perf_counter()
        try:
            params = SamplingParams(output_kind=RequestOutputKind.DELTA, extra_args=options, **sampling)
            engine.add_request(name, prompt, params)
        except (ValueError, VLLMValidationError) as error:
            raise WatchError(f"the engine refuses the request: {error}") from None
        try:
            while engine.has_unfinished_requests():
                for output in engine.step():
                    [completion] = output.outputs
                    trace = getattr(completion, TRACE, None)
                    if completion.token_ids:
                        yield Chunk(time.perf_counter() - start, list(completion.token_ids), _found(trace))
        finally:
            if engine.has_unfinished_requests():
                engine.abort_request([name])


class ServerSource(Source):
    """A server at a URL. A key is taken from the variable ``OPENAI_API_KEY``."""

    def __init__(self, url: str, model: str | None):
        self._url = url.rstrip("/").removesuffix("/v1")
        if not self._url.startswith(("http://", "https://")):
            self._url = f"http://{self._url}"
        self.model = model or ""
        if not model:
            self.model = self._found("/v1/models", None, lambda found: found["data"][0]["id"])

    def decode(self, token_ids: Sequence[int]) -> str:
        """See :class:`Source`."""
        body = {"model": self.model, "tokens": list(token_ids)}
        return self._found("/detokenize", body, lambda found: found["prompt"])

    def chunks(self, prompt: str, options: dict[str, Any], **sampling: Any) -> Chunks:
        """See :class:`Source`."""
        body = {"model": self.model, "prompt": prompt, "stream": True, "return_token_ids": True, **sampling}
        start = time.perf_counter()
        # The server aborts a request whose connection is closed.
        with self._ask("/v1/completions", body | {"vllm_xargs": options}) as answer:
            for line in self._lines(answer):
                kind, _, data = line.decode().strip().partition(": ")
                if kind != "data":
                    continue
                if data == "[DONE]":
                    return
                event = json.loads(data)
                if "error" in event:
                    raise WatchError(f"the server reports an error: {_message(event)}")
                for choice in event["choices"]:
                    if token_ids := choice.get("token_ids"):
                        trace = choice.get(TRACE)
                        found = _found(trace and DiffusionTrace.from_json(trace))
                        yield Chunk(time.perf_counter() - start, token_ids, found)
        raise WatchError(f"{self._url} broke off")

    def _found(self, path: str, body: dict[str, Any] | None, part: Callable[[Any], str]) -> str:
        """A part of an answer in JSON."""
        with self._ask(path, body) as answer:
            text = b"".join(self._lines(answer))
        try:
            return part(json.loads(text))
        except (ValueError, LookupError, TypeError):
            raise WatchError(f"{self._url}{path} answers, but not as vLLM does") from None

    def _lines(self, answer: Any) -> Iterator[bytes]:
        try:
            yield from answer
        except (OSError, http.client.HTTPException) as error:
            raise WatchError(f"{self._url} broke off: {error or type(error).__name__}") from None

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self._url + path, data, headers)
            return urllib.request.urlopen(request, timeout=SECONDS_TO_ANSWER)
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            raise WatchError(f"{self._url}{path} answers with HTTP {error.code}: {_message(text)}") from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise WatchError(f"{self._url} does not answer: {reason}") from None


def _found(trace: DiffusionTrace | None) -> DiffusionTrace:
    if trace is None:
        raise WatchError("no trace came with the tokens: is this a vllm-twotower engine that knows diffusion_trace?")
    return trace


def _message(answer: Any) -> str:
    """The words of an error that a server sent."""
    try:
        found = json.loads(answer) if isinstance(answer, str) else answer
        error = found.get("error", found)
        return str(error.get("message") or error.get("detail") or error)
    except (ValueError, AttributeError):
        return str(answer)[:300]


@contextmanager
def offline_source(model: Path) -> Iterator[OfflineSource]:
    """An engine for one request at a time, that ends with the block."""
    if not (model / "config.json").is_file():
        raise WatchError(f"{model} is no folder of a checkpoint: it has no config.json")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    log = Path(tempfile.gettempdir()) / "vllm-twotower-watch.log"
    # Without a size the cache of an embedded model would be gigabytes.
    options: dict[str, Any] = {"kv_cache_memory_bytes": 64 << 20} if model == embedded_model() else {}
    with ExitStack() as stack:
        try:
            with logged_to(log):  # what is printed at startup would stand between the lines that are drawn
                llm = stack.enter_context(small_engine(model, max_num_seqs=2, use_tqdm_on_load=False, **options))
        except ValueError as error:
            raise WatchError(f"the engine does not start: {error}; its log is in {log}") from None
        yield OfflineSource(llm, model.resolve().name)


def ahead(chunks: Chunks) -> Chunks:
    """The same chunks, read in a thread as they come, however slowly they are looked at."""
    found: queue.SimpleQueue[Any] = queue.SimpleQueue()
    stop = threading.Event()

    def read() -> None:
        try:
            for chunk in chunks:
                found.put(chunk)
                if stop.is_set():
                    break
        except BaseException as error:
            found.put(error)
        finally:
            chunks.close()
            found.put(None)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        while (item := found.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        reader.join(SECONDS_TO_STOP)
