"""Training documents as token files: made once from a configuration's sources, then mapped into memory.

A folder holds ``tokens.bin`` (little-endian uint16, or uint32 from 65,536 tokens of vocabulary on) with all documents
one after the other, each BOS, prompt, answer, EOS; and ``documents.npy``, a row for each with where it starts, where
its answer starts, and the index of its source.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from vllm_twotower.progress import progress_bar
from vllm_twotower.training.config import DataConfig, SourceConfig, SpecialTokens, TrainConfigError
from vllm_twotower.training.problems import draw_training_problem
from vllm_twotower.training.stdlib_text import draw_piece, library_prose, library_sources

Text = tuple[str, str]
"""(prompt, answer); text without a prompt is all answer."""
_BATCH = 4096  # texts tokenised at once


@dataclass(frozen=True)
class Document:
    """BOS, prompt, answer, EOS (n,); ``answer_start`` is the index of the answer's first token."""

    tokens: np.ndarray
    answer_start: int
    answer_weight: float

    def weights(self, prompt_weight: float) -> np.ndarray:
        """(n,) fp32: the loss weight of every token."""
        weights = np.full(len(self.tokens), self.answer_weight, np.float32)
        weights[: self.answer_start] = prompt_weight
        return weights


class Corpus:
    """All documents of a folder of token files, read where they lie, and the ids of the special tokens in them."""

    def __init__(self, folder: Path, sources: list[SourceConfig], special: SpecialTokens):
        self.special = special
        self._documents = np.load(folder / "documents.npy", mmap_mode="r")
        self._tokens = np.memmap(folder / "tokens.bin", mode="r", dtype=(folder / "dtype").read_text())
        self._weights = [source.weight for source in sources]

    def __len__(self) -> int:
        return len(self._documents)

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> Document:
        start, answer_start, source = map(int, self._documents[index])
        end = int(self._documents[index + 1][0]) if index + 1 < len(self) else len(self._tokens)
        return Document(self._tokens[start:end], answer_start, self._weights[source])

    def draw(self, rng: random.Random) -> Document:
        """Any document."""
        return self[rng.randrange(len(self))]


def prepare_corpus(config: DataConfig, seed: int, tokenizer: Tokenizer, special: SpecialTokens, folder: Path) -> Corpus:
    """The corpus of a configuration, written into ``folder`` if it is not there yet."""
    if not folder.exists():
        partial_folder = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial_folder, ignore_errors=True)
        partial_folder.mkdir(parents=True)
        _write(config, seed, tokenizer, special, partial_folder)
        partial_folder.rename(folder)
    return Corpus(folder, config.sources, special)


def _write(config: DataConfig, seed: int, tokenizer: Tokenizer, special: SpecialTokens, folder: Path) -> None:
    dtype = "<u2" if tokenizer.get_vocab_size() <= 1 << 16 else "<u4"
    rows: list[tuple[int, int, int]] = []
    length = 0
    counts = [source.documents for source in config.sources]
    total = sum(counts) if all(counts) else None
    with (folder / "tokens.bin").open("wb") as file, progress_bar("making the data", total, "documents") as bar:
        for index, source in enumerate(config.sources):
            for tokens, answer_start in _tokenised(source_texts(source, seed), tokenizer, config.sequence_length - 2):
                file.write(np.array([special.bos, *tokens, special.eos], dtype).tobytes())
                rows.append((length, 1 + answer_start, index))
                length += len(tokens) + 2
                bar.update()
    if not rows:
        raise TrainConfigError("data.sources has no document")
    np.save(folder / "documents.npy", np.array(rows, np.int64))
    (folder / "dtype").write_text(dtype)


def _tokenised(texts: Iterable[Text], tokenizer: Tokenizer, longest: int) -> Iterator[tuple[list[int], int]]:
    """Tokens and the answer's start of every document; prompts and answers are tokenised apart, as at inference.

    What is longer than ``longest`` tokens goes on in a document without a prompt.
    """
    encode = partial(tokenizer.encode_batch, add_special_tokens=False)
    texts = iter(texts)
    while batch := list(islice(texts, _BATCH)):
        for prompt, answer in zip(*(encode(list(part)) for part in zip(*batch, strict=True)), strict=True):
            tokens, start = prompt.ids + answer.ids, len(prompt.ids)
            for first in range(0, len(tokens), longest):
                yield tokens[first : first + longest], start if first == 0 else 0


def source_texts(source: SourceConfig, seed: int) -> Iterator[Text]:
    """The texts of one source."""
    rng = random.Random(f"{seed}/{source.kind}")
    if source.kind == "problems":
        for _ in range(source.documents):
            problem = draw_training_problem(rng, source.mix)
            yield problem.prompt, problem.answer
    elif source.kind in ("library", "prose"):
        pieces = library_sources() if source.kind == "library" else library_prose()
        for _ in range(source.documents):
            yield "", draw_piece(rng, pieces, source.characters)
    else:
        yield from islice(_file_texts(source), source.documents or None)


def _file_texts(source: SourceConfig) -> Iterator[Text]:
    """The lines of a JSONL file, or a text file as one text."""
    path = Path(source.path)
    if source.kind == "text":
        yield "", path.read_text(encoding="utf-8")
        return
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                text = ("", entry["text"]) if "text" in entry else (entry["prompt"], entry["answer"])
            except (ValueError, KeyError, TypeError) as error:
                raise TrainConfigError(
                    f"{path}, line {number}: expected a JSON object with text, or with prompt and answer"
                ) from error
            yield text
