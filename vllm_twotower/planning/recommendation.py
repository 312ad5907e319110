"""What ``vllm-twotower plan --recommend`` says: cards, mode, threshold, passes and command, each with its reason."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .cost_model import CostModel, Load, PlannedMode
from .hardware import DEVICES
from .texts import FORCED_TOKENS_PER_PASS, OPEN_PASSES, steps_of_text

UNSURE = 1.25
"""Modes that are closer are not told apart: on published times the planner is off by nearly a fifth
(``calibration.py``)."""

TEXTS = {
    "arithmetic": "arithmetic problems",
    "answers": "answers to arithmetic problems",
    "humaneval": "code like HumanEval",
    "open": "open prompts",
    "given": "these texts",
}


class Question(NamedTuple):
    """A card, how many requests are open, and what they are like (``load.num_open`` does not matter)."""

    card: str
    num_open: int
    load: Load
    text: str
    threshold: float
    experts_dtype: str | None
    linear_dtype: str | None


def recommend(question: Question, model_with: Callable[[int], CostModel], sizes: Sequence[int]) -> dict[str, Any]:
    """The answer as data, and in words as ``text``; ``sizes`` are the tensor parallel sizes to choose from.

    The fewest cards are taken that hold all open requests, or those that hold the most.
    """
    context = int(question.load.context_len)
    fitting = [(size, model_with(size).max_requests(context)) for size in sizes]
    most = max(fitting, key=lambda pair: (pair[1], pair[0]))
    cards, room = next((pair for pair in fitting if pair[1] >= question.num_open), most)
    answer: dict[str, Any] = {"card": question.card, "open": question.num_open, "requests_that_fit": room}
    if not room:
        needs = model_with(cards).size.weight_bytes / 1e9
        text = (
            f"The model does not fit: its weights take {needs:.1f} GB on each of {cards} x {question.card}. "
            "--experts-dtype fp8 --linear-dtype fp8 takes half of what bf16 does."
        )
        return answer | {"tensor_parallel_size": None, "text": text}
    model, served = model_with(cards), min(question.num_open, room)
    load = question.load._replace(num_open=served)
    modes: tuple[PlannedMode, ...] = ("ar", "mask_diffusion", "verified")
    speeds = {mode: model.tokens_per_second(mode, load) for mode in modes}
    mode = _mode(speeds)
    answer |= {
        "tensor_parallel_size": cards,
        "tokens_per_second": speeds,
        **mode,
        "threshold": question.threshold,
        "command": _command(question, cards, served, context, mode),
    }
    lines = [
        f"Cards: {cards} x {question.card}. {_room(model, question, room)}",
        f"Mode: {mode['mode']}. {_why(speeds, mode, question, load)}",
        f"Threshold: {_threshold(model, load, question)}",
        f"Passes: leave diffusion_max_steps at 16. {_forced()}",
        f"Start: {answer['command']}",
        *_quantisation(question),
        f"Figures are for {model.hardware.seconds_per_context_pass * 1e3:g} ms a pass beside memory and arithmetic "
        "(--pass-overhead; an ideal engine has 0). The more it is, the better for blocks.",
    ]
    return answer | {"text": "\n".join(lines)}


def _mode(speeds: dict[PlannedMode, float]) -> dict[str, Any]:
    """The options ``mode`` and ``lossless``: ``auto`` where the planner cannot tell which mode is faster.

    ``verified`` is left to ``auto``, which measures how many tokens of a draft are right: nobody has published it.
    """
    diffusion, verified = (speeds[mode] / speeds["ar"] for mode in ("mask_diffusion", "verified"))
    if diffusion > UNSURE:
        return {"mode": "mask_diffusion"}
    if max(diffusion, verified) < 1 / UNSURE:
        return {"mode": "ar"}
    return {"mode": "auto", "lossless": True} if verified > diffusion else {"mode": "auto"}


def _room(model: CostModel, question: Question, room: int) -> str:
    fits = f"{room:,} request{'s' if room != 1 else ''} of {question.load.context_len:,} tokens fit"
    waiting = f", so {question.num_open - room:,} of {question.num_open:,} wait" if room < question.num_open else ""
    return f"The weights take {model.size.weight_bytes / 1e9:.1f} GB of each; {fits} beside them{waiting}."


def _why(speeds: dict[PlannedMode, float], mode: dict[str, Any], question: Question, load: Load) -> str:
    diffusion, verified = (
        f"{speeds[name]:,.0f} ({speeds[name] / speeds['ar']:.2f} times)" for name in ("mask_diffusion", "verified")
    )
    figures = (
        f"With {load.num_open:,} open, and {load.steps_per_block.mean:.1f} denoiser passes a block for "
        f"{TEXTS[question.text]}: ar {speeds['ar']:,.0f} tokens/s, mask_diffusion {diffusion}, verified {verified} if "
        f"{load.accepted.mean:.1f} tokens of a draft are right."
    )
    reasons = {
        "ar": "Token by token is faster by more than this plan is off.",
        "auto": "They are closer than this plan is exact; auto measures ar and mask_diffusion and takes the faster.",
        "mask_diffusion": "Blocks are faster by more than this plan is off. For exactly the text of ar, take auto with "
        "lossless: it measures whether verified is faster.",
        "lossless": "auto with lossless measures ar and verified, and takes the faster; the text is that of ar.",
    }
    return f"{figures} {reasons['lossless' if mode.get('lossless') else mode['mode']]}"


def _threshold(model: CostModel, load: Load, question: Question) -> str:
    if question.text == "given":
        return f"{question.threshold:g}, if these passes a block were measured with it."
    low = min(OPEN_PASSES)
    faster = load._replace(steps_per_block=steps_of_text(question.text, low))
    gain = model.tokens_per_second("mask_diffusion", faster) / model.tokens_per_second("mask_diffusion", load)
    lower = (
        f"With {low:g} a block takes {faster.steps_per_block.mean:.1f} passes, and mask_diffusion gives {gain:.2f} "
        "times as many tokens. "
    )
    return f"{question.threshold:g}. {lower if gain > 1 else ''}NVIDIA's figures of the model's quality are for 0.8."


def _forced() -> str:
    forced = " and ".join(f"{tokens:g} tokens a pass with {steps}" for steps, tokens in FORCED_TOKENS_PER_PASS.items())
    return f"Fewer are faster ({forced}), but nobody has published how good such texts are; with 1 none was right."


def _command(question: Question, cards: int, served: int, context: int, mode: dict[str, Any]) -> str:
    options = mode | ({"confidence_threshold": question.threshold} if question.threshold != 0.8 else {})
    parts = ["vllm serve <checkpoint>"]
    parts += [f"--tensor-parallel-size {cards}"] if cards > 1 else []
    parts += [f"--max-num-seqs {served}", f"--max-model-len {context}"]
    if online := _online_quantisation(question):
        parts.append(f"--quantization {online}")
    return " ".join([*parts, f"--additional-config '{json.dumps({'twotower': options})}'"])


def _online_quantisation(question: Question) -> str | None:
    """What makes vLLM quantise a bf16 checkpoint so while it loads it, if it can; where, tells
    tests/unit/test_kernels_of_schemes.py."""
    match question.experts_dtype, question.linear_dtype:
        case "fp8", "fp8":
            return "fp8_per_channel" if "fp8" in DEVICES[question.card].speedups else "fp8_per_tensor"
        case "int8", None | "bf16":
            return "int8_per_channel_weight_only"
        case "nvfp4", None | "bf16" if question.card == "B200":
            return "nvfp4_per_token"
    return None


def _quantisation(question: Question) -> list[str]:
    dtypes = {"experts": question.experts_dtype, "dense": question.linear_dtype}
    quantised = {part: dtype for part, dtype in dtypes.items() if dtype not in (None, "bf16")}
    if not quantised:
        return []
    lines = ["Quantised weights have not been tried on a GPU with this plugin."]
    if _online_quantisation(question):
        return lines
    if "nvfp4" in quantised.values():
        return [*lines, "These need a checkpoint made so, as by ModelOpt."]
    options = " ".join(f"--{part} {dtype}" for part, dtype in quantised.items())
    return [*lines, f"The checkpoint is made by: vllm-twotower quantize <checkpoint> <new checkpoint> {options}"]
