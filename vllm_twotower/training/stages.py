"""The two stages, and the model and tokenizer they start from."""

from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer
from torch import nn

from vllm_twotower.reference import TwoTowerConfig, TwoTowerModel
from vllm_twotower.training.attention import block_attention
from vllm_twotower.training.config import TrainConfig
from vllm_twotower.training.corpus import Corpus, prepare_corpus, source_texts
from vllm_twotower.training.data import make_ar_batch, make_denoiser_batch, step_rng
from vllm_twotower.training.distributed import barrier, device, rank, shard, world_size
from vllm_twotower.training.initialise import initialise, start_denoiser_from_context, tie_towers
from vllm_twotower.training.objective import ar_loss, denoiser_loss
from vllm_twotower.training.tokenizer import copy_tokenizer, load_tokenizer, save_tokenizer, train_tokenizer
from vllm_twotower.training.trainer import Progress, Stage, load_checkpoint, run_stage

AR, DENOISER = "ar", "denoiser"


def prepare_tokenizer(config: TrainConfig, run_dir: Path) -> Tokenizer:
    """Loads the run's tokenizer; before that, takes it from the checkpoint to start from, or trains it on the mix."""
    folder = run_dir / "tokenizer"
    if not (folder / "tokenizer.json").exists():
        if config.init_from:
            copy_tokenizer(Path(config.init_from), folder)
        else:
            assert config.tokenizer is not None
            texts = ("".join(text) for text in _mixed_texts(config))
            tokenizer = train_tokenizer(texts, config.tokenizer.vocab_size)
            save_tokenizer(tokenizer, folder, config.model["max_position_embeddings"])
    return load_tokenizer(folder)


def _mixed_texts(config: TrainConfig) -> Iterator[tuple[str, str]]:
    """The tokenizer's share of every source."""
    assert config.tokenizer is not None
    total = sum(source.documents for source in config.data.sources)
    for source in config.data.sources:
        share = config.tokenizer.documents * source.documents // total if total else config.tokenizer.documents
        yield from islice(source_texts(source, config.seed), share)


def new_model(config: TrainConfig) -> TwoTowerModel:
    """The model in fp32 before the first step: untrained, or the checkpoint to start from."""
    if config.init_from:
        return TwoTowerModel.from_pretrained(config.init_from)
    model = TwoTowerModel(TwoTowerConfig.from_dict(config.model))
    initialise(model, config.seed)
    return model


def prepare(config: TrainConfig, run_dir: Path) -> Corpus:
    """Tokenizer and corpus, made by the first rank."""
    if rank() == 0:
        prepare_corpus(
            config.data, config.seed, prepare_tokenizer(config, run_dir), config.special_tokens, run_dir / "data"
        )
    barrier()
    tokenizer = load_tokenizer(run_dir / "tokenizer")
    return prepare_corpus(config.data, config.seed, tokenizer, config.special_tokens, run_dir / "data")


def train(config: TrainConfig, run_dir: Path) -> None:
    """Runs what is left of the stages."""
    corpus = prepare(config, run_dir)
    model = new_model(config)
    if config.denoiser.tied_towers:
        tie_towers(model)
    model.to(device())
    if world_size() > 1:
        shard(model)
    if config.ar is not None:
        run_stage(model, ar_stage(model, config, corpus), config, run_dir)
    is_new = not (run_dir / f"{DENOISER}.pt").exists()
    if is_new and not config.init_from and not config.denoiser.tied_towers:
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
    stage = config.ar
    assert stage is not None
    return Stage(
        name=AR,
        config=stage,
        trained=[model.context_tower, model.context_lm_head],
        make_batch=lambda step: make_ar_batch(step_rng(config.seed, AR, step), stage.batch_size, config.data, corpus),
        loss=ar_loss,
        tokens_per_step=stage.batch_size * config.data.sequence_length,
    )


def denoiser_stage(model: TwoTowerModel, config: TrainConfig, corpus: Corpus) -> Stage:
    """Stage 2: the denoiser, its head and the time conditioning fill blocks after the context tower's states."""
    stage = config.denoiser
    trained: list[nn.Module] = [model.denoiser_tower, model.lm_head]
    if stage.time_conditioning:
        trained += [model.t_embedder, model.t_block, model.scale_shift_tables]
    if not stage.freeze_context:
        trained += [model.context_tower]
    if stage.context_ar_weight:
        trained += [model.context_lm_head]
    return Stage(
        name=DENOISER,
        config=stage,
        trained=trained,
        make_batch=lambda step: make_denoiser_batch(
            step_rng(config.seed, DENOISER, step), stage, config.data, corpus, step
        ),
        loss=partial(denoiser_loss, stage=stage, attention=block_attention(config, device())),
        tokens_per_step=stage.batch_size * stage.blocks_per_sequence * config.data.block_size,
    )
