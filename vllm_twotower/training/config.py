"""The training configuration: a YAML file read into dataclasses, every key checked."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from vllm_twotower.training.problems import FAMILIES


class TrainConfigError(ValueError):
    """The training configuration has an unknown, missing or impossible value."""


@dataclass(frozen=True)
class TokenizerConfig:
    """BPE of `vocab_size` tokens, trained on `documents` documents of the training mix."""

    vocab_size: int
    documents: int


@dataclass(frozen=True)
class SourceConfig:
    """Where training documents come from, and what each of their answers' tokens counts in the loss.

    ``kind``: ``problems`` made from templates, of the families of ``mix``; ``library`` and ``prose``, pieces of code
    and of the reference from the Python that runs the training; ``jsonl``, a file with an object a line that has
    ``text``, or ``prompt`` and ``answer``; ``text``, a file that is one document. Documents longer than a sequence are
    split.
    """

    kind: str
    documents: int = 0  # how many; 0 for all of a file
    weight: float = 1.0
    path: str = ""
    characters: int = 0  # longest piece of ``library`` and ``prose``
    mix: dict[str, float] = field(default_factory=dict)  # family of problems -> relative frequency

    def __post_init__(self) -> None:
        if self.kind not in SOURCE_NEEDS:
            raise TrainConfigError(f"data.sources has kind {self.kind!r}; known are {', '.join(SOURCE_NEEDS)}")
        for name in SOURCE_NEEDS[self.kind]:
            if not getattr(self, name):
                raise TrainConfigError(f"a source of kind {self.kind} in data.sources needs {name}")
        if unknown := sorted(set(self.mix) - set(FAMILIES)):
            raise TrainConfigError(
                f"the mix in data.sources has unknown families {unknown}: known are {sorted(FAMILIES)}"
            )
        if self.path and not Path(self.path).is_file():
            raise TrainConfigError(f"data.sources names the file {self.path}, which does not exist")


SOURCE_NEEDS = {
    "problems": ("documents", "mix"),
    "library": ("documents", "characters"),
    "prose": ("documents", "characters"),
    "jsonl": ("path",),
    "text": ("path",),
}


@dataclass(frozen=True)
class DataConfig:
    """What the training documents are and how they are packed."""

    sequence_length: int  # tokens of a packed sequence
    block_size: int  # tokens of a denoiser block
    sources: list[SourceConfig]
    prompt_weight: float  # loss weight of a prompt's tokens
    fill_weight: float  # and of EOS tokens that fill a block past its document's end

    @property
    def mix(self) -> dict[str, float]:
        """The families of problems and their frequencies, for evaluation."""
        mixes = [source.mix for source in self.sources if source.mix]
        if not mixes:
            raise TrainConfigError("data.sources has no problems to evaluate on")
        return mixes[0]


@dataclass(frozen=True)
class StageConfig:
    """One training stage: AdamW, linear warm-up, constant rate, linear decay to zero over the last steps."""

    steps: int
    batch_size: int  # sequences
    learning_rate: float
    warmup_steps: int
    decay_fraction: float  # of all steps
    weight_decay: float
    clip_norm: float

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise TrainConfigError("steps and batch_size must be at least 1")
        if not 0 <= self.decay_fraction <= 1:
            raise TrainConfigError(f"decay_fraction is {self.decay_fraction}: it must be within 0 and 1")


@dataclass(frozen=True)
class DenoiserStageConfig(StageConfig):
    """The denoiser's stage, and how its blocks and masks are drawn."""

    blocks_per_sequence: int
    answer_block_share: float  # share of blocks that start where an answer starts, or a whole number of blocks later
    full_mask_share: float  # share of blocks with t = 1, on top of t ~ U[0.001, 1] for the others

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("answer_block_share", "full_mask_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise TrainConfigError(f"{name} is {getattr(self, name)}: it must be within 0 and 1")


@dataclass(frozen=True)
class EvaluationConfig:
    """Greedy generation on held-out problems: autoregressive, and mask diffusion at every `gammas`."""

    problems: int
    gammas: list[float]
    max_new_tokens: int


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the trained model; `model` is the config.json to be written."""

    seed: int
    run_dir: str  # checkpoints, logs and results; may be deleted after the export
    export_dir: str
    threads: int
    compile: bool
    bf16_autocast: bool
    checkpoint_minutes: float
    log_every: int  # steps
    model: dict[str, Any]
    tokenizer: TokenizerConfig
    data: DataConfig
    ar: StageConfig
    denoiser: DenoiserStageConfig
    evaluation: EvaluationConfig

    def __post_init__(self) -> None:
        if self.model.get("vocab_size") != self.tokenizer.vocab_size:
            raise TrainConfigError("model.vocab_size and tokenizer.vocab_size differ")


def load_config(path: str | Path) -> TrainConfig:
    """Reads a YAML file; raises TrainConfigError naming the offending key."""
    content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    return parse_section(TrainConfig, content, where="")


def parse_section(section: type, content: Any, where: str) -> Any:
    """Builds dataclass `section` from a mapping, recursively; `where` is the dotted path for error messages."""
    if not isinstance(content, Mapping):
        raise TrainConfigError(f"{where or 'the configuration'} must be a mapping, not {type(content).__name__}")
    prefix = f"{where}." if where else ""
    known = {entry.name: entry for entry in fields(section)}
    for name in content:
        if name not in known:
            raise TrainConfigError(f"unknown key {prefix}{name}; known keys are {', '.join(known)}")
    for name, entry in known.items():
        if name not in content and entry.default is MISSING and entry.default_factory is MISSING:
            raise TrainConfigError(f"missing key {prefix}{name}")
    hints = get_type_hints(section)
    return section(**{name: _parse_value(hints[name], value, prefix + name) for name, value in content.items()})


def _parse_value(hint: Any, value: Any, where: str) -> Any:
    if is_dataclass(hint):
        return parse_section(hint, value, where)
    expected = get_origin(hint) or hint
    if expected is list and isinstance(value, list):
        return [_parse_value(get_args(hint)[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise TrainConfigError(f"{where} is {value!r}: expected {expected.__name__}")
    return value
