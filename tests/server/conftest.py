"""The servers of this folder's tests, each started once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import golden_data
import pytest
from serving import REPOSITORY, Server, running_server
from vllm.tokenizers import TokenizerLike, get_tokenizer

from vllm_twotower.reference import TwoTowerModel

TINY = REPOSITORY / "models" / "tiny-twotower"


@pytest.fixture(scope="session", autouse=True)
def stop_servers_when_terminated() -> Iterator[None]:
    """A terminated test run ends as an interrupted one does, so that no server outlives it."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Golden checkpoint A in float32: prompts beyond 512 tokens come in chunks, the 33rd request waits.

    The checkpoint has no chat template; here a chat is the text of its messages.
    """
    log = tmp_path_factory.mktemp("server") / "golden.log"
    options = ("--dtype", "float32", "--max-model-len", "1024", "--kv-cache-memory-bytes", "64M")
    options += ("--max-num-seqs", "32", "--max-num-batched-tokens", "512")
    options += ("--chat-template", "{% for message in messages %}{{ message.content }}{% endfor %}")
    with running_server(golden_data.checkpoint("A"), log, *options) as running:
        yield running


@pytest.fixture(scope="session")
def oracle() -> TwoTowerModel:
    """The plain model of the same checkpoint."""
    return TwoTowerModel.from_pretrained(golden_data.checkpoint("A"))


@pytest.fixture(scope="session")
def tokenizer() -> TokenizerLike:
    """The tokenizer of the same checkpoint, as the server has it."""
    return get_tokenizer(golden_data.checkpoint("A"))


@pytest.fixture(scope="session")
def tiny_folder() -> Path:
    """The trained model of this repository."""
    return TINY


@pytest.fixture(scope="module")
def tiny_server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The trained model, served as the README says: with the repository's serve profile."""
    log = tmp_path_factory.mktemp("server") / "tiny.log"
    with running_server(tiny_folder, log, "--config", "configs/tiny-cpu.yaml", name="tiny-twotower") as running:
        yield running
