"""Writes a trained run as a model folder: weights in bf16, tokenizer, held-out problems, loss curve, model card."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from vllm_twotower.evaluation.answers import held_out_problems
from vllm_twotower.reference import TwoTowerModel
from vllm_twotower.training.config import SourceConfig, StageConfig, TrainConfig
from vllm_twotower.training.problems import HELD_OUT_ONE_IN, Problem
from vllm_twotower.training.stages import AR, DENOISER, load_latest
from vllm_twotower.training.trainer import Progress, read_log

HELD_OUT_SAMPLE = 200


def export_run(config: TrainConfig, run_dir: Path) -> None:
    """Exports the newest weights of a run to export_dir.

    The card has the scores of `vllm-twotower eval`, if it wrote them into the run's folder `evaluation`.
    """
    folder = Path(config.export_dir)
    folder.mkdir(parents=True, exist_ok=True)
    model, progress = load_latest(config, run_dir)
    model.save_pretrained(folder, torch.bfloat16)
    (folder / "config.json").write_text(json.dumps(config.model, indent=2) + "\n", encoding="utf-8")
    for file in (run_dir / "tokenizer").iterdir():
        shutil.copy(file, folder)
    if config.data.mix:
        write_problems(folder / "heldout.jsonl", held_out_problems(HELD_OUT_SAMPLE, config.seed)[1])
    draw_losses(folder / "loss.png", {stage: read_log(run_dir, stage) for stage in progress})
    (folder / "README.md").write_text(model_card(config, model, progress, run_dir), encoding="utf-8")


def write_problems(path: Path, problems: list[Problem]) -> None:
    """One JSON object a line: family, prompt (without BOS), answer in full, result to look for."""
    lines = [
        json.dumps({"family": one.family, "prompt": one.prompt, "answer": one.answer, "result": one.result})
        for one in problems
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def draw_losses(path: Path, logs: dict[str, list[dict[str, Any]]]) -> None:
    """Loss over tokens, one panel a stage."""
    from matplotlib.figure import Figure

    titles = {AR: "context tower: next token", DENOISER: "denoiser: masked tokens"}
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, (stage, log) in zip(figure.subplots(1, len(logs), squeeze=False)[0], logs.items(), strict=True):
        axes.plot([entry["tokens"] / 1e6 for entry in log], [entry["loss"] for entry in log], linewidth=1)
        axes.set(title=titles[stage], xlabel="million tokens", ylabel="weighted cross-entropy (nats)", yscale="log")
        axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=110)


def model_card(config: TrainConfig, model: TwoTowerModel, progress: dict[str, Progress], run_dir: Path) -> str:
    """README.md of the model folder."""
    sections = [
        _continued_introduction(config) if config.init_from else _INTRODUCTION,
        _size_section(config, model),
        _training_section(config, progress, run_dir),
        _evaluation_section(run_dir / "evaluation" / "results.md"),
    ]
    if not config.init_from:
        sections.append(_LIMITS)
    return "\n".join(sections)


_INTRODUCTION = """\
---
license: apache-2.0
language: en
tags: [block-diffusion, twotower, nemotron-h, tiny]
---

# tiny-twotower

A very small TwoTower block-diffusion language model in the key layout of NVIDIA's Nemotron TwoTower, trained from
nothing on generated text. It exists so that vllm-twotower can be tested, demonstrated and benchmarked anywhere with a
model whose answers can be right or wrong. It knows the templates of `vllm_twotower/training/problems/` (word problems,
lists, units, dates, JSON), and nothing else.

Prompts have the form of the training data; the chat template produces it:

```
Question: Tom has 12 apples and buys 7 more. How many apples does he have?
Answer: 12 + 7 = 19. He has 19 apples. The answer is 19.
```
"""


def _continued_introduction(config: TrainConfig) -> str:
    name = Path(config.export_dir).name
    return f"""\
# {name}

A TwoTower block-diffusion language model in the key layout of NVIDIA's Nemotron TwoTower, trained from
{Path(config.init_from).name}.
"""


_LIMITS = """\
## Limits

- The questions must be worded like the templates in `vllm_twotower/training/problems/`; other English gives nonsense.
- Numbers beyond the trained ranges (sums of two numbers up to 99, products up to 9 * 12) are mostly wrong.
- Names, things and most numbers of a held-out problem occur in training; only the combination of template and numbers
  (or words) is new. The scores say that the model applies what it saw, not that it can reason.
- Trained on blocks of 16 tokens; larger blocks fail. Chats of more than one turn resemble packed training documents,
  but no question refers to an earlier one.
"""


def _size_section(config: TrainConfig, model: TwoTowerModel) -> str:
    def millions(*modules: torch.nn.Module) -> str:
        return f"{sum(p.numel() for module in modules for p in module.parameters()) / 1e6:.2f} M"

    c = model.config
    time_modules = (model.t_embedder, model.t_block, model.scale_shift_tables)
    return f"""\
## Size

| part | parameters |
|---|---|
| context tower and head | {millions(model.context_tower, model.context_lm_head)} |
| denoiser tower and head | {millions(model.denoiser_tower, model.lm_head)} |
| time conditioning | {millions(*time_modules)} |
| all, in bf16 | {millions(model)} |

Pattern `{c.pattern}` (M Mamba-2, * attention, - MLP), hidden size {c.hidden_size}, {c.num_attention_heads} attention
heads of {c.head_dim} with {c.num_key_value_heads} KV heads, {c.mamba_num_heads} Mamba heads of {c.mamba_head_dim} in
{c.n_groups} groups with state size {c.ssm_state_size}, byte-level BPE of {c.vocab_size} tokens with single digits,
`<unk>` 0, `<s>` 1, `</s>` 2, `<mask>` 3, block size {config.data.block_size}.
"""


def _training_section(config: TrainConfig, progress: dict[str, Progress], run_dir: Path) -> str:
    sources = ", ".join(_source(source) for source in config.data.sources)
    rows = "\n".join(
        _stage_row(stage, settings, progress[name], read_log(run_dir, name))
        for name, stage, settings in ((AR, "context tower, AR", config.ar), (DENOISER, "denoiser", config.denoiser))
        if name in progress and settings is not None
    )
    python = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    data, denoiser = config.data, config.denoiser
    return f"""\
## Training

`vllm-twotower train` with seed {config.seed} on {sources}.
Pieces come from the Python that runs the training (here {python}; another version gives others). One problem in
{HELD_OUT_ONE_IN} is held out, by a hash of its template and its numbers or words. Packed sequences of
{data.sequence_length} tokens; loss weights {data.prompt_weight:g} for prompts, {data.fill_weight:g} for the EOS tokens
that fill a last block, those named for pieces, 1 for
answers. AdamW, constant rate, linear decay over the last part.

Of the denoiser's blocks
{denoiser.answer_block_share:.0%} start where an answer starts or a multiple of {data.block_size} tokens later, the
others anywhere. t is 1 for {denoiser.full_mask_share:.0%} of the blocks and otherwise uniform in [0.001, 1]; each token
is masked with probability t.

| stage | steps | predicted positions | minutes | peak learning rate | last loss |
|---|---|---|---|---|---|
{rows}

Loss is the weighted cross-entropy in nats, before each update:

![loss](loss.png)
"""


def _source(source: SourceConfig) -> str:
    if source.mix:
        families = ", ".join(family.replace("_", " ") for family in source.mix)
        return f"{source.documents:,} templated problems ({families})"
    kinds = {"library": "pieces of the standard library", "prose": "pieces of the language reference"}
    return f"{source.documents:,} {kinds.get(source.kind, source.path)} (weight {source.weight:g})"


def _stage_row(title: str, settings: StageConfig, progress: Progress, log: list[dict[str, Any]]) -> str:
    tokens, loss = log[-1]["tokens"] / 1e6, log[-1]["loss"]
    return (
        f"| {title} | {progress.step} of {settings.steps} | {tokens:.1f} M | {progress.seconds / 60:.0f} | "
        f"{settings.learning_rate:g} | {loss:.4f} |"
    )


def _evaluation_section(results: Path) -> str:
    """What `vllm-twotower eval` wrote, below its title."""
    text = results.read_text(encoding="utf-8").partition("\n")[2].strip() if results.exists() else "Not evaluated."
    return f"## Evaluation\n\n{text}\n"
