"""The training configuration: a YAML file read into dataclasses, every key checked."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from vllm_twotower.architecture import TwoTowerConfig
from vllm_twotower.training.problems import FAMILIES

ATTENTIONS = ("dense", "flex", "xformers")


class TrainConfigError(ValueError):
    """The training configuration has an unknown, missing or impossible value."""


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens that begin and end a document, and of the mask."""

    bos: int
    eos: int
    mask: int


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
        """The families of problems and their frequencies; empty if no source has problems."""
        return next((source.mix for source in self.sources if source.mix), {})


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One training stage: AdamW, linear warm-up, constant rate, linear decay to zero over the last steps."""

    steps: int
    batch_size: int  # sequences of one update, over all ranks
    learning_rate: float
    warmup_steps: int
    decay_fraction: float  # of all steps
    weight_decay: float
    clip_norm: float
    accumulate: int = 1  # parts of the batch whose gradients are added up before the update

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or self.accumulate < 1:
            raise TrainConfigError("steps, batch_size and accumulate must be at least 1")
        if self.batch_size % self.accumulate:
            raise TrainConfigError(
                f"batch_size ({self.batch_size}) must be a multiple of accumulate ({self.accumulate})"
            )
        if not 0 <= self.decay_fraction <= 1:
            raise TrainConfigError(f"decay_fraction is {self.decay_fraction}: it must be within 0 and 1")


@dataclass(frozen=True, kw_only=True)
class DenoiserStageConfig(StageConfig):
    """The denoiser's stage, and how its blocks and masks are drawn.

    The options are those of Megatron's ``two_tower``: ``tied_towers``, one tower for both; ``freeze_context``;
    ``context_ar_weight``, of a next-token loss of the context tower beside the denoiser's; ``time_conditioning``,
    without which the denoiser stays as it starts in this respect, shift 0, scale 0, gate 1. (``bidirectional_mamba`` is
    one of the model's.)
    """

    blocks_per_sequence: int
    answer_block_share: float  # share of blocks that start where an answer starts, or a whole number of blocks later
    full_mask_share: float  # share of blocks with t = 1, on top of t ~ U[0.001, 1] for the others
    block_size_schedule: list[list[int]] = field(default_factory=list)  # [first step, block size], before data's own
    tied_towers: bool = False
    freeze_context: bool = True
    context_ar_weight: float = 0.0
    time_conditioning: bool = True

    def block_size(self, step: int, default: int) -> int:
        """The width of the blocks in a step; ``default`` where the schedule has none."""
        return next((size for first, size in reversed(self.block_size_schedule) if step >= first), default)

    def __post_init__(self) -> None:
        super().__post_init__()
        schedule = self.block_size_schedule
        if any(len(entry) != 2 or entry[0] < 0 or entry[1] < 1 for entry in schedule) or schedule != sorted(schedule):
            raise TrainConfigError(
                f"denoiser.block_size_schedule is {schedule}: expected pairs of a first step and a block size, by step"
            )
        if self.tied_towers and self.freeze_context:
            raise TrainConfigError("denoiser.tied_towers needs freeze_context: false, as both towers are one")
        if self.context_ar_weight and self.freeze_context:
            raise TrainConfigError("denoiser.context_ar_weight needs freeze_context: false")
        for name in ("answer_block_share", "full_mask_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise TrainConfigError(f"{name} is {getattr(self, name)}: it must be within 0 and 1")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the trained model.

    ``model`` is the config.json to be written. With ``init_from``, a TwoTower checkpoint (`vllm-twotower init` makes
    one), training starts from its weights, configuration and tokenizer, and there is no ``model`` and no ``tokenizer``,
    and ``ar`` only if the context tower is to be trained further.
    """

    seed: int
    run_dir: str  # checkpoints, logs and results; may be deleted after the export
    export_dir: str
    threads: int
    compile: bool
    bf16_autocast: bool
    checkpoint_minutes: float
    log_every: int  # steps
    data: DataConfig
    denoiser: DenoiserStageConfig
    model: dict[str, Any] = field(default_factory=dict)
    tokenizer: TokenizerConfig | None = None
    ar: StageConfig | None = None
    init_from: str = ""
    data_workers: int = 0  # at most so many processes make batches ahead, one less than there are cores; for GPUs
    attention: str = ""  # of the denoiser: one of ATTENTIONS; by default flex on GPUs and dense on CPUs

    def __post_init__(self) -> None:
        if self.attention not in ("", *ATTENTIONS):
            raise TrainConfigError(f"attention is {self.attention!r}: it must be one of {', '.join(ATTENTIONS)}")
        if self.init_from:
            if self.model or self.tokenizer:
                raise TrainConfigError("with init_from, model and tokenizer come from that checkpoint: leave them out")
            config = Path(self.init_from) / "config.json"
            if not config.is_file():
                raise TrainConfigError(f"init_from is {self.init_from}: there is no config.json")
            self.model.update(json.loads(config.read_text()))
            return
        for name in ("model", "tokenizer", "ar"):
            if not getattr(self, name):
                raise TrainConfigError(f"missing key {name} (or init_from, a checkpoint to start from)")
        if self.tokenizer and self.model.get("vocab_size") != self.tokenizer.vocab_size:
            raise TrainConfigError("model.vocab_size and tokenizer.vocab_size differ")

    @property
    def special_tokens(self) -> SpecialTokens:
        """The model's token ids with a meaning."""
        config = TwoTowerConfig.from_dict(self.model)
        return SpecialTokens(self.model.get("bos_token_id", 1), config.eos_token_id, config.mask_token_id)


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
    if isinstance(hint, UnionType):  # an optional section
        hint = next(choice for choice in get_args(hint) if choice is not type(None))
    if isinstance(hint, type) and is_dataclass(hint):
        return parse_section(hint, value, where)
    expected = get_origin(hint) or hint
    if expected is list and isinstance(value, list):
        return [_parse_value(get_args(hint)[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise TrainConfigError(f"{where} is {value!r}: expected {expected.__name__}")
    return value
