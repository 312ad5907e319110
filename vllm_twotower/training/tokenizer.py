"""Trains the small byte-level BPE tokenizer and writes the files that AutoTokenizer reads."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

OPTIONAL_FILES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja")
UNK, BOS, EOS, MASK = "<unk>", "<s>", "</s>", "<mask>"
SPECIAL_TOKENS = (UNK, BOS, EOS, MASK)  # in the order of their ids, 0 to 3, as in the released checkpoint
UNK_ID, BOS_ID, EOS_ID, MASK_ID = range(4)

# Digits are split singly and never merge with the space before them: one token per digit wherever it stands, so the
# model meets ten digits and not a thousand number words. Otherwise GPT-2's rule: words carry their leading space.
WORD_PATTERN = r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# One turn looks like a training document, and turns follow each other like packed documents. System messages are
# left out: the model was never shown any.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ '<s>Question: ' + message['content'] + '\\nAnswer:' }}"
    "{%- elif message['role'] == 'assistant' -%}{{ ' ' + message['content'] | trim + '</s>' }}"
    "{%- endif -%}{%- endfor -%}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of exactly `vocab_size` tokens in which every text round-trips."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the texts yield only {tokenizer.get_vocab_size()} tokens of the {vocab_size} asked for")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, model_max_length: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json, special_tokens_map.json and generation_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"unk_token": UNK, "bos_token": BOS, "eos_token": EOS, "mask_token": MASK, "pad_token": UNK}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model_max_length,
        "chat_template": CHAT_TEMPLATE,
    }
    generation = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": UNK_ID}
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "generation_config.json", generation)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies a checkpoint's tokenizer and generation configuration; raises FileNotFoundError if it has none."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", *OPTIONAL_FILES):
        if name == "tokenizer.json" or (source / name).exists():
            shutil.copy(source / name, folder)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The bare tokenizer: `encode(text, add_special_tokens=False).ids`."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
