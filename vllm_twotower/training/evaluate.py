"""Judges a model on held-out problems: AR, mask diffusion at several gammas, and the cross-entropy by block offset."""

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from vllm_twotower.reference import Generation, TwoTowerModel, generate_ar, generate_mask_diffusion
from vllm_twotower.training.config import TrainConfig
from vllm_twotower.training.corpus import prepare_corpus
from vllm_twotower.training.data import START_KINDS, make_denoiser_batch, step_rng
from vllm_twotower.training.objective import full_mask_loss_by_kind
from vllm_twotower.training.problems import Problem, draw_held_out_problems, is_right
from vllm_twotower.training.stages import load_latest
from vllm_twotower.training.tokenizer import load_tokenizer

Generate = Callable[[list[int]], Generation]


@dataclass(frozen=True)
class Score:
    """How one way of generating did on a list of problems, batch of one, greedy."""

    mode: str
    problems: int
    right: int
    new_tokens: int  # up to and including EOS
    passes: int  # of the denoiser; for AR of the context tower
    seconds: float
    wrong_by_family: dict[str, int]

    @property
    def accuracy(self) -> float:
        return self.right / self.problems

    @property
    def tokens_per_pass(self) -> float:
        return self.new_tokens / self.passes


def evaluation_problems(config: TrainConfig, count: int) -> list[Problem]:
    """The first `count` problems of the evaluation's stream of held-out problems."""
    return draw_held_out_problems(step_rng(config.seed, "evaluation", 0), config.data.mix, count)


def evaluate_run(config: TrainConfig, run_dir: Path) -> None:
    """Evaluates the newest weights of a run, rounded to bf16 as they are exported; writes evaluation.json."""
    model, _ = load_latest(config, run_dir)
    model = model.to(torch.bfloat16).float()
    tokenizer = load_tokenizer(run_dir / "tokenizer")
    problems = evaluation_problems(config, config.evaluation.problems)
    scores = []
    for mode, generate in generation_modes(model, config).items():
        scores.append(score(mode, generate, problems, tokenizer, config.special_tokens.bos))
        print(f"{mode}: {scores[-1].right} of {scores[-1].problems} right, {scores[-1].seconds:.0f} s", flush=True)
    corpus = prepare_corpus(config.data, config.seed, tokenizer, config.special_tokens, run_dir / "data")
    batch = make_denoiser_batch(step_rng(config.seed, "evaluation", 1), config.denoiser, config.data, corpus)
    losses = {START_KINDS[kind]: loss for kind, loss in full_mask_loss_by_kind(model, batch).items()}
    result = {"scores": [asdict(one) for one in scores], "full_mask_loss": losses}
    (run_dir / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def read_scores(run_dir: Path) -> tuple[list[Score], dict[str, float]]:
    """What evaluate_run wrote: the scores, and the cross-entropy of wholly masked blocks by kind of start."""
    result = json.loads((run_dir / "evaluation.json").read_text(encoding="utf-8"))
    return [Score(**entry) for entry in result["scores"]], result["full_mask_loss"]


def generation_modes(model: TwoTowerModel, config: TrainConfig) -> dict[str, Generate]:
    """Name -> function from a prompt's tokens to its continuation."""
    length = config.evaluation.max_new_tokens

    def diffusion(gamma: float) -> Generate:
        return lambda prompt: generate_mask_diffusion(
            model,
            prompt,
            length,
            block_size=config.data.block_size,
            gamma=gamma,
            eos_token_id=config.special_tokens.eos,
        )

    modes: dict[str, Generate] = {
        "AR": lambda prompt: generate_ar(model, prompt, length, eos_token_id=config.special_tokens.eos)
    }
    return modes | {f"diffusion, gamma {gamma:g}": diffusion(gamma) for gamma in config.evaluation.gammas}


def score(mode: str, generate: Generate, problems: list[Problem], tokenizer: Tokenizer, bos: int) -> Score:
    """Generates an answer to every problem and marks it."""
    right = new_tokens = passes = 0
    wrong: Counter[str] = Counter()
    started = time.monotonic()
    for problem in problems:
        prompt = [bos, *tokenizer.encode(problem.prompt, add_special_tokens=False).ids]
        generation = generate(prompt)
        new_tokens += len(generation.tokens)
        passes += generation.nfe or len(generation.tokens)
        if is_right(tokenizer.decode(generation.tokens), problem):
            right += 1
        else:
            wrong[problem.family] += 1
    return Score(mode, len(problems), right, new_tokens, passes, time.monotonic() - started, dict(wrong))
