"""What was measured, on disk as it comes: an interrupted command that is given again goes on from there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO


@dataclass(frozen=True)
class Answer:
    """An answer to problem number ``problem``, and what the request's trace says of it.

    ``decided_in`` has an entry for each token, ``blocks`` the fields of :class:`~vllm_twotower.trace.BlockTrace`.
    """

    problem: int
    text: str
    right: bool
    decided_in: list[int | None]
    blocks: list[dict[str, Any]]

    @property
    def passes(self) -> int:
        """Of the denoiser; of both towers for verified drafts; of the context tower for tokens without a block."""
        in_blocks = sum(block["tokens"] for block in self.blocks)
        of_blocks = sum(block["passes"] + ("drafted" in block) for block in self.blocks)
        return of_blocks + len(self.decided_in) - in_blocks


def key_of(settings: Any) -> str:
    """A name for settings: equal ones have the same, in any process."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Store:
    """A folder with ``results.jsonl``, a line for everything that is finished, and the answers of each run.

    A line that was being written when the process died is written anew.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "answers").mkdir(parents=True, exist_ok=True)
        self._results = folder / "results.jsonl"
        self._finished = {entry["key"]: entry for entry in _whole_lines(self._results)}

    def get(self, key: str) -> dict[str, Any] | None:
        """What :meth:`put` was given, None if nothing yet."""
        return self._finished.get(key)

    def put(self, key: str, content: dict[str, Any]) -> None:
        """Writes what is finished."""
        entry = {"key": key, **content}
        with self._results.open("a", encoding="utf-8") as file:
            _write_line(file, entry)
        self._finished[key] = json.loads(json.dumps(entry))

    def answers(self, key: str) -> list[Answer]:
        """The answers of a run so far, by problem."""
        found = {entry["problem"]: Answer(**entry) for entry in _whole_lines(self._path(key))}
        return [found[problem] for problem in sorted(found)]

    @contextmanager
    def appending(self, key: str) -> Iterator[_Appender]:
        """Adds answers of a run."""
        with self._path(key).open("a", encoding="utf-8") as file:
            yield _Appender(file)

    def _path(self, key: str) -> Path:
        return self.folder / "answers" / f"{key}.jsonl"


class _Appender:
    def __init__(self, file: TextIO):
        self._file = file

    def add(self, answer: Answer) -> None:
        """Writes an answer."""
        _write_line(self._file, asdict(answer))


def _write_line(file: TextIO, entry: dict[str, Any]) -> None:
    file.write(json.dumps(entry) + "\n")
    file.flush()


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The entries of a file, which loses what stands behind the last end of a line."""
    if not path.exists():
        return []
    content = path.read_bytes()
    if whole := content[: content.rfind(b"\n") + 1]:
        if len(whole) < len(content):
            path.write_bytes(whole)
    elif content:
        path.write_bytes(b"")
    return [json.loads(line) for line in whole.splitlines()]
