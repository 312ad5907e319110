"""What one request must return with any sampling options: plain loops over positions, to compare the engine with.

Nothing is shared with the serving engine but the hash that gives the random numbers; the logits come from the plain
model. Where a comment says "step", it is the number s = 0, 1, ... that the noise schedules and the random numbers
count; a step of the posterior strategy that commits nothing needs no pass of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from vllm import SamplingParams

from vllm_twotower.kernels import uniform
from vllm_twotower.reference import TwoTowerModel
from vllm_twotower.reference.layers import LayerState

MASKED_LOGIT = -1e12
NOTHING_LEFT = -1e11
"""Rules that leave no logit above this are waived: what is left is then -inf or the mask token."""
SMALLEST_TIME = 1e-5


@dataclass
class Token:
    """A returned token with what it is reported with; ``top`` is best first, or in ``logprob_token_ids``' order."""

    id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


@dataclass
class Expected:
    """What a request returns; ``nfe`` counts denoiser passes, ``blocks`` the canvases, cut ones included."""

    tokens: list[Token]
    finish_reason: str
    nfe: int
    blocks: int

    @property
    def token_ids(self) -> list[int]:
        return [token.id for token in self.tokens]


def expected(
    model: TwoTowerModel,
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    eos_token_id: int | None = 2,
    mask_token_id: int = 3,
    canvas_length: int = 16,
    max_steps: int = 16,
    threshold: float = 0.8,
    max_model_len: int = 1024,
    seed: int | None = None,
    logprobs_mode: str = "raw_logprobs",
) -> Expected:
    """The result of one request; the keyword arguments are the engine's configuration.

    ``seed`` stands for what the engine makes up for a request whose ``params.seed`` is None.
    """
    if logprobs_mode not in ("raw_logprobs", "processed_logprobs"):
        raise ValueError(f"logprobs_mode={logprobs_mode!r}")
    if len(prompt) >= max_model_len:
        raise ValueError(f"a prompt of {len(prompt)} tokens leaves no room in max_model_len={max_model_len}")
    given = {name: value for name, value in (params.extra_args or {}).items() if value is not None}
    options = _Options(
        mode=given.pop("diffusion_mode", "mask_diffusion"),
        threshold=given.pop("diffusion_confidence_threshold", threshold),
        max_steps=given.pop("diffusion_max_steps", max_steps),
        canvas_length=given.pop("diffusion_canvas_length", canvas_length),
        strategy=given.pop("diffusion_strategy", "confidence_unmasking"),
        noise_schedule=given.pop("diffusion_noise_schedule", "linear"),
        adaptive_unmasking=given.pop("diffusion_adaptive_unmasking", False),
        remasking=given.pop("diffusion_remasking", "confidence"),
    )
    for name in ("diffusion_draft_steps", "diffusion_trace"):  # which change no token
        given.pop(name, None)
    if given:
        raise ValueError(f"unknown options {sorted(given)}")
    if params.seed is not None:
        seed = params.seed
    request = _Request(
        model,
        list(prompt),
        params,
        options,
        eos_token_id,
        mask_token_id,
        max_model_len,
        None if seed is None else seed % 2**63,
        logprobs_mode,
    )
    with torch.inference_mode():
        if options.mode == "mask_diffusion":
            return request.mask_diffusion()
        return request.ar()


@torch.inference_mode()
def prompt_logprobs(model: TwoTowerModel, prompt: Sequence[int]) -> list[tuple[int, float, int]]:
    """(token id, log-probability, rank) of the prompt's tokens from the second on, from the context tower's logits."""
    logits = model.context_logits(torch.tensor([list(prompt)], device=model.lm_head.weight.device))[0].float()
    result = []
    for position in range(1, len(prompt)):
        token = prompt[position]
        before = logits[position - 1]
        result.append((token, float(before.log_softmax(-1)[token]), _rank(before, token)))
    return result


@dataclass(frozen=True)
class _Options:
    """The request's TwoTower options, without the prefix of their names."""

    mode: str
    threshold: float
    max_steps: int
    canvas_length: int
    strategy: str
    noise_schedule: str
    adaptive_unmasking: bool
    remasking: str


@dataclass
class _Prediction:
    """The token predicted at a position, and what decides whether it is committed.

    ``confidence`` is its probability under the rules, neither tempered nor filtered, ``margin`` the difference of the
    two largest of these probabilities. ``reported`` (V,) are the logits its log-probability comes from.
    """

    token: int
    confidence: float
    margin: float
    energy: float
    reported: Tensor


@dataclass
class _Request:
    """One request and the configuration of the engine that serves it."""

    model: TwoTowerModel
    prompt: list[int]
    params: SamplingParams
    options: _Options
    eos_token_id: int | None
    mask_token_id: int
    max_model_len: int
    seed: int | None
    logprobs_mode: str

    # Modes

    def mask_diffusion(self) -> Expected:
        """Blocks after the prompt, each generated whole, until the tokens so far contain the end."""
        output: list[Token] = []
        nfe = blocks = 0
        state = self._advance(self.prompt, None)[1] if self.prompt else None
        while (end := self._end(output)) is None:
            room = self.max_model_len - len(self.prompt) - len(output)
            block, passes = self._block(output, state, min(self.options.canvas_length, room))
            output += block
            nfe += passes
            blocks += 1
            state = self._advance([token.id for token in block], state)[1]
        length, reason = end
        return Expected(output[:length], reason, nfe, blocks)

    def ar(self) -> Expected:
        """Next tokens from the context tower and its head."""
        output: list[Token] = []
        logits, state = self._advance(self.prompt, None)
        while (end := self._end(output)) is None:
            output.append(self._next_token(logits, output))
            logits, state = self._advance([output[-1].id], state)
        return Expected(output, end[1], 0, 0)

    def _tensor(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor(tokens, device=self.model.lm_head.weight.device)

    def _advance(self, tokens: list[int], state: list[LayerState] | None) -> tuple[Tensor, list[LayerState]]:
        """The context tower reads ``tokens``: logits (V,) for the next one, and its state."""
        logits, state = self.model.advance_context(self._tensor([tokens]), state)
        return logits[0].float(), state

    def _end(self, output: list[Token]) -> tuple[int, str] | None:
        """The number of tokens to return and the finish reason, or None if the request is not finished."""
        stops = set(self.params.stop_token_ids)
        if not self.params.ignore_eos and self.eos_token_id is not None:
            stops.add(self.eos_token_id)
        for number, token in enumerate(output, 1):
            if token.id in stops and number >= self.params.min_tokens:
                return number, "stop"
            if number == self.params.max_tokens or len(self.prompt) + number >= self.max_model_len:
                return number, "length"
        return None

    def _next_token(self, raw: Tensor, output: list[Token]) -> Token:
        """The token after ``output`` from raw logits (V,)."""
        tokens: list[int | None] = [token.id for token in output]
        prediction = self._predict(raw, tokens + [None], len(output), (len(self.prompt) + len(output), 0, 0))
        return self._report(prediction)

    # Blocks

    def _block(self, output: list[Token], state: list[LayerState] | None, width: int) -> tuple[list[Token], int]:
        """The next block of ``width`` tokens after ``output``, and the number of denoiser passes it took."""
        start = len(self.prompt) + len(output)
        before: list[int | None] = [token.id for token in output]
        canvas: list[Token | None] = [None] * width
        step = passes = 0
        while None in canvas:
            ids = [None if token is None else token.id for token in canvas]
            time = self._denoiser_time(step, ids.count(None), width)
            logits = self.model.denoiser_logits(
                self._tensor([self.mask_token_id if token is None else token for token in ids]),
                state,
                torch.tensor([time], dtype=torch.float32, device=self.model.lm_head.weight.device),
            ).float()
            passes += 1
            predictions: dict[int, _Prediction] = {}
            for column in range(width):
                if ids[column] is None:
                    raw = logits[column].clone()
                    raw[self.mask_token_id] = MASKED_LOGIT
                    index = len(output) + column
                    predictions[column] = self._predict(raw, before + ids, index, (start, step, column))
            while not (chosen := self._choose(predictions, start, step, width)):
                step += 1  # the canvas has not changed, so neither would the logits
            for column in self._without_bad_words(chosen, predictions, before, ids):
                canvas[column] = self._report(predictions[column])
            step += 1
        return canvas, passes

    def _denoiser_time(self, step: int, masked: int, width: int) -> float:
        """The time that the denoiser is told; after the last step it stands still."""
        if self.options.strategy == "confidence_unmasking":
            return masked / width
        time = self._time(min(step, self.options.max_steps - 1))
        return time if self.options.noise_schedule == "linear" else 1 - self._alpha(time)

    def _time(self, step: int) -> float:
        return 1 - step * (1 - SMALLEST_TIME) / self.options.max_steps

    def _alpha(self, time: float) -> float:
        """The share of positions that are clean at ``time``."""
        if self.options.noise_schedule == "linear":
            return 1 - time
        if self.options.noise_schedule == "cosine":
            return math.cos(math.pi * time / 2)
        if self.options.noise_schedule == "exponential":
            return (math.exp(-3 * time) - math.exp(-3)) / (1 - math.exp(-3))
        raise ValueError(f"noise_schedule={self.options.noise_schedule!r}")

    def _choose(self, predictions: dict[int, _Prediction], start: int, step: int, width: int) -> list[int]:
        """The columns to commit in this step; ``predictions`` are those of the masked columns, in order."""
        masked, last = list(predictions), step >= self.options.max_steps - 1
        even_share = math.ceil(len(masked) / max(self.options.max_steps - step, 1))
        if self.options.strategy == "confidence_unmasking":
            # Confidences are fp32, so the threshold must be: 0.8 itself is not above 0.8.
            threshold = float(torch.tensor(self.options.threshold, dtype=torch.float32))
            confident = [column for column in masked if predictions[column].confidence > threshold]
            count = min(len(masked), max(len(confident), 1, even_share))
            return _best(masked, [predictions[column].confidence for column in masked], count)
        if self.options.strategy not in ("posterior", "predict_and_noise"):
            raise ValueError(f"strategy={self.options.strategy!r}")
        if last:
            return masked
        alpha, next_alpha = self._alpha(self._time(step)), self._alpha(self._time(step + 1))
        if self.options.strategy == "posterior":
            rate = (next_alpha - alpha) / (1 - alpha)
            chosen = []
            for column in masked:
                evidence = math.log(rate / (1 - rate)) + predictions[column].energy
                if self._is_greedy:
                    commits = evidence > 0
                else:
                    commits = self._uniform(start, step, column, 1) < _sigmoid(evidence / self.params.temperature)
                if commits:
                    chosen.append(column)
            return chosen
        if self.options.adaptive_unmasking:
            count = 1 if step / self.options.max_steps < 0.4 else even_share
            stay = max(len(masked) - count, 0)
        else:
            stay = max(min(int((1 - next_alpha) * width), len(masked) - 1), 0)
        if self.options.remasking == "random":
            scores = [self._uniform(start, step, column, 1) for column in masked]
        elif self.options.remasking in ("confidence", "margin"):
            scores = [getattr(predictions[column], self.options.remasking) for column in masked]
        else:
            raise ValueError(f"remasking={self.options.remasking!r}")
        return _best(masked, scores, len(masked) - stay)

    def _without_bad_words(
        self,
        chosen: Iterable[int],
        predictions: dict[int, _Prediction],
        before: list[int | None],
        ids: list[int | None],
    ) -> list[int]:
        """The chosen columns less those that would complete a bad word together with other chosen ones.

        Of all that bad words touch, the most confident column stays, so every pass commits something. The rules keep
        the others from completing the word in later passes.
        """
        chosen = set(chosen)
        while True:
            after = [predictions[column].token if column in chosen else token for column, token in enumerate(ids)]
            tokens = before + after
            taken_back: set[int] = set()
            for word in self._bad_words:
                for first in range(len(tokens) - len(word) + 1):
                    if len(word) == 1 or tokens[first : first + len(word)] != word:
                        continue
                    columns = [position - len(before) for position in range(first, first + len(word))]
                    new = [column for column in columns if column in chosen]
                    if new:
                        keep = _best(new, [predictions[column].confidence for column in new], 1)
                        taken_back |= set(new) - set(keep)
            if not taken_back:
                return sorted(chosen)
            chosen -= taken_back

    # Positions

    @property
    def _is_greedy(self) -> bool:
        return self.params.temperature < 1e-5

    @property
    def _bad_words(self) -> list[list[int]]:
        return [list(word) for word in self.params.bad_words_token_ids or []]

    def _uniform(self, *counters: int) -> float:
        if self.seed is None:
            raise ValueError("the request draws random numbers but has no seed")
        return uniform(torch.tensor(self.seed), *map(torch.tensor, counters)).item()

    def _predict(
        self, raw: Tensor, output: list[int | None], index: int, counters: tuple[int, int, int]
    ) -> _Prediction:
        """The prediction for output position ``index`` from raw logits (V,).

        ``output`` are the output tokens so far, None where undecided, up to the end of the block; ``counters`` are
        what the random number depends on.
        """
        logits = self._apply_rules(raw, output, index)
        probabilities = logits.softmax(-1)
        largest = probabilities.sort(descending=True).values
        if self._is_greedy:
            filtered, token = logits, int(logits.argmax())
            energy = float(logits.max() - logits.logsumexp(-1))
        else:
            filtered = self._temper_and_filter(logits)
            token = _draw(filtered, self._uniform(*counters))
            energy = float(self.params.temperature * filtered.logsumexp(-1) - logits.logsumexp(-1))
        return _Prediction(
            token=token,
            confidence=float(probabilities[token]),
            margin=float(largest[0] - largest[1]),
            energy=energy,
            reported=raw if self.logprobs_mode == "raw_logprobs" else filtered,
        )

    def _apply_rules(self, raw: Tensor, output: list[int | None], index: int) -> Tensor:
        """Logits (V,) under the request's rules, or the raw ones if the rules leave nothing."""
        params, logits = self.params, raw.clone()
        if params.allowed_token_ids is not None:
            allowed = set(params.allowed_token_ids)
            logits[[token for token in range(len(logits)) if token not in allowed]] = -math.inf
        for token, bias in (params.logit_bias or {}).items():
            logits[token] += bias

        if index < params.min_tokens:
            for token in params.all_stop_token_ids:
                logits[token] = -math.inf
            if self.eos_token_id is not None:
                logits[self.eos_token_id] = -math.inf

        decided = [token for token in output if token is not None]
        seen = sorted(set(self.prompt + decided))
        penalty = params.repetition_penalty
        logits[seen] = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
        for token in set(decided):
            logits[token] -= params.frequency_penalty * decided.count(token)
            logits[token] -= params.presence_penalty

        for word in self._bad_words:
            for place, token in enumerate(word):
                first = index - place
                if first < 0 or first + len(word) > len(output):
                    continue
                window = output[first : first + len(word)]
                if all(window[i] == word[i] for i in range(len(word)) if i != place):
                    logits[token] = -math.inf
        return raw if logits.max() < NOTHING_LEFT else logits

    def _temper_and_filter(self, logits: Tensor) -> Tensor:
        """Logits (V,) over the temperature, -inf where min-p, top-k or top-p drop them, in this order."""
        logits = logits / self.params.temperature
        if self.params.min_p > 0:
            logits[logits < logits.max() + math.log(self.params.min_p)] = -math.inf
        if 0 < self.params.top_k < len(logits):
            logits[logits < logits.sort(descending=True).values[self.params.top_k - 1]] = -math.inf
        if self.params.top_p < 1:
            ascending, order = logits.sort(stable=True)
            cumulative = ascending.softmax(-1).cumsum(-1)
            dropped = cumulative <= 1 - torch.tensor(self.params.top_p, dtype=torch.float32, device=logits.device)
            dropped[-1] = False
            logits[order[dropped]] = -math.inf
        return logits

    def _report(self, prediction: _Prediction) -> Token:
        logprobs = prediction.reported.log_softmax(-1)
        if self.params.logprob_token_ids:
            top_ids = list(self.params.logprob_token_ids)
        else:
            count = self.params.logprobs or 0
            count = len(logprobs) if count == -1 else count
            top_ids = prediction.reported.sort(descending=True, stable=True).indices[:count].tolist()
        return Token(
            id=prediction.token,
            logprob=float(logprobs[prediction.token]),
            rank=_rank(prediction.reported, prediction.token),
            top=[(token, float(logprobs[token])) for token in top_ids],
        )


def _rank(logits: Tensor, token: int) -> int:
    return int((logits >= logits[token]).sum())


def _best(columns: list[int], scores: list[float], count: int) -> list[int]:
    """The ``count`` columns of the highest scores, the first column first where scores are equal."""
    ranked = sorted(zip(columns, scores, strict=True), key=lambda pair: (-pair[1], pair[0]))
    return [column for column, _ in ranked[:count]]


def _draw(logits: Tensor, number: float) -> int:
    """The first token whose cumulative probability under logits (V,) exceeds ``number`` of the total."""
    cumulative = list(accumulate(logits.softmax(-1).tolist()))  # Python adds in fp64
    return next(token for token, value in enumerate(cumulative) if value > number * cumulative[-1])


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
