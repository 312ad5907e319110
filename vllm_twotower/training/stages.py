"""The two stages, and the model and tokenizer they start from."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer

from vllm_twotower.reference import TwoTowerConfig, TwoTowerModel
from vllm_twotower.training.config import TrainConfig
from vllm_twotower.training.corpus import Corpus, prepare_corpus, source_texts
from vllm_twotower.training.data import make_ar_batch, make_denoiser_batch, step_rng
from vllm_twotower.training.initialise import initialise, start_denoiser_from_context
from vllm_twotower.training.objective import ar_loss, denoiser_loss
from vllm_twotower.training.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from vllm_twotower.training.trainer import Progress, Stage, load_checkpoint, run_stage

AR, DENOISER = "ar", "denoiser"


def prepare_tokenizer(config: TrainConfig, run_dir: Path) -> Tokenizer:
    """Loads the run's tokenizer, or trains it on documents of the training mix first."""
    folder = run_dir / "tokenizer"
    if not (folder / "tokenizer.json").exists():
        texts = ("".join(text) for text in _mixed_texts(config))
        tokenizer = train_tokenizer(texts, config.tokenizer.vocab_size)
        save_tokenizer(tokenizer, folder, config.model["max_position_embeddings"])
    return load_tokenizer(folder)


def _mixed_texts(config: TrainConfig) -> Iterator[tuple[str, str]]:
    """The tokenizer's share of every source."""
    total = sum(source.documents for source in config.data.sources)
    for source in config.data.sources:
        share = config.tokenizer.documents * source.documents // total if total else config.tokenizer.documents
        yield from islice(source_texts(source, config.seed), share)


def new_model(config: TrainConfig) -> TwoTowerModel:
    """The untrained model in fp32."""
    model = TwoTowerModel(TwoTowerConfig.from_dict(config.model))
    initialise(model, config.seed)
    return model


def train(config: TrainConfig, run_dir: Path) -> None:
    """Runs what is left of both stages."""
    tokenizer = prepare_tokenizer(config, run_dir)
    corpus = prepare_corpus(config.data, config.seed, tokenizer, run_dir / "data")
    model = new_model(config)
    run_stage(model, ar_stage(model, config, corpus), config, run_dir)
    if not (run_dir / f"{DENOISER}.pt").exists():
        start_denoiser_from_context(model)
    run_stage(model, denoiser_stage(model, config, corpus), config, run_dir)


def load_latest(config: TrainConfig, run_dir: Path) -> tuple[TwoTowerModel, dict[str, Progress]]:
    """The newest weights of a run and how far each of its stages is; the denoiser may still be untrained."""
    model = new_model(config)
    progress = {}
    for stage in (AR, DENOISER):
        if (run_dir / f"{stage}.pt").exists():
            progress[stage] = load_checkpoint(run_dir / f"{stage}.pt", model)
    if not progress:
        raise FileNotFoundError(f"{run_dir} holds no checkpoint to evaluate or export")
    return model.eval().requires_grad_(False), progress


def ar_stage(model: TwoTowerModel, config: TrainConfig, corpus: Corpus) -> Stage:
    """Stage 1: the context tower and its head predict the next token."""
    return Stage(
        name=AR,
        config=config.ar,
        trained=[model.context_tower, model.context_lm_head],
        make_batch=lambda step: make_ar_batch(
            step_rng(config.seed, AR, step), config.ar.batch_size, config.data, corpus
        ),
        loss=ar_loss,
        tokens_per_step=config.ar.batch_size * config.data.sequence_length,
    )


def denoiser_stage(model: TwoTowerModel, config: TrainConfig, corpus: Corpus) -> Stage:
    """Stage 2: the denoiser, its head and the time conditioning fill blocks after the frozen context tower's states."""
    return Stage(
        name=DENOISER,
        config=config.denoiser,
        trained=[model.denoiser_tower, model.lm_head, model.t_embedder, model.t_block, model.scale_shift_tables],
        make_batch=lambda step: make_denoiser_batch(
            step_rng(config.seed, DENOISER, step), config.denoiser, config.data, corpus
        ),
        loss=denoiser_loss,
        tokens_per_step=config.denoiser.batch_size * config.denoiser.blocks_per_sequence * config.data.block_size,
    )
