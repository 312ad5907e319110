"""Which tokens a pass predicts: one way from logits to tokens for every position, whoever fills its block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from vllm.config import ModelConfig
from vllm.v1.worker.gpu.sample.sampler import Sampler

from vllm_twotower.kernels import uniform
from vllm_twotower.model.step_logits import Draw, OutputHead
from vllm_twotower.sampling.prediction import draw, margin, probability, runner_up, temper_and_filter
from vllm_twotower.sampling.row_options import RowOptions

from .logit_rules import RuledRows
from .logits_processors import CustomLogitsProcessors
from .request_table import RequestTable
from .targets import Targets
from .token_logprobs import ScoredTokens

Some = TypeVar("Some", bound=Targets)


@dataclass
class Prediction:
    """What a pass predicts at T positions.

    ``tokens`` (T,) int64; ``is_finite`` (T,) bool, whether the logits were; where they were asked for, ``confidence``
    (T,) fp32, the tokens' probability before temperature and filters, ``margin`` and ``energy`` (T,) fp32, see
    ``DenoiserPass``, and of traced requests ``runner_up``, which gives the largest probability (T,) fp32 of another
    token. ``scored`` are the tokens whose log-probabilities are kept if they are committed, ``ruled`` the
    rows with rules.
    """

    tokens: Tensor
    is_finite: Tensor
    confidence: Tensor | None = None
    margin: Tensor | None = None
    energy: Tensor | None = None
    runner_up: Callable[[], Tensor] | None = None
    scored: ScoredTokens | None = None
    ruled: RuledRows | None = None


class Decision:
    """Predicts tokens as their requests ask: grammar, rules, custom processors, temperature and filters, draw.

    ``logprobs_mode`` of the model's configuration says whether log-probabilities are those of the logits as the model
    gives them (``raw``) or of the distribution that tokens are drawn from (``processed``).
    """

    def __init__(self, sampler: Sampler, table: RequestTable, model_config: ModelConfig):
        self._table, self._states = table, sampler.req_states
        self.processors = CustomLogitsProcessors(sampler)
        self._scores_processed = model_config.logprobs_mode.startswith("processed")
        self._scores_as_logits = model_config.logprobs_mode.endswith("logits")

    def predict(
        self, targets: Some, hidden: Tensor, head: OutputHead, tile: int, needs: frozenset[str] = frozenset()
    ) -> Iterator[tuple[Some, Prediction]]:
        """Predictions from hidden states (T, H), a tile of at most so many rows of logits at a time.

        ``needs`` are fields of :class:`Prediction` to be computed. Where the head chooses tokens itself, only targets
        that need whole rows of logits have them.
        """
        for index, whole_rows in self._tiles(targets, head, tile):
            part, of_part = targets, hidden
            if len(index) < len(targets):
                part = cast(Some, targets.take(index))
                of_part = hidden[part.on_device(targets.positions_of(index))]
            if whole_rows:
                yield part, self._from_logits(part, head(of_part).float(), needs)
            else:
                chosen = head.choose(of_part, part.never, self._draws(part), part.is_traced)
                predicted = Prediction(chosen.tokens, chosen.confidence.isfinite(), chosen.confidence)
                predicted.runner_up = chosen.runner_up
                predicted.energy = chosen.confidence.log() if "energy" in needs else None
                yield part, predicted

    def needs_logits(self, slots: np.ndarray) -> np.ndarray:
        """Which of the requests in slots (n,) need whole rows of logits; grammars are not known here."""
        return self._table.needs_logits(slots) | self.processors.applies[slots]

    def record(self, targets: Targets, predicted: Prediction, committed: Tensor) -> None:
        """Keeps the log-probabilities of the positions that are ``committed`` (T,) bool."""
        if predicted.scored is not None:
            self._table.logprobs.record(predicted.scored, committed, predicted.tokens, self._scores_as_logits)

    def _tiles(self, targets: Targets, head: OutputHead, tile: int) -> Iterator[tuple[np.ndarray, bool]]:
        """Rows of the targets, and whether they are scored by whole rows of logits."""
        slots, together = targets.host_slots, targets.rows_together
        size = max(1, tile // (targets.rows.even_width * together)) * together
        whole = np.arange(len(slots))
        if head.chooses:
            needs_logits = self.needs_logits(slots) | targets.has_grammar
            others, whole = np.flatnonzero(~needs_logits), np.flatnonzero(needs_logits)
            # Of a shard of the vocabulary, and without a copy in fp32, more rows take no more memory.
            more = size * 2 * head.num_shards
            for start in range(0, len(others), more):
                yield others[start : start + more], False
        for start in range(0, len(whole), size):
            yield whole[start : start + size], True

    def _draws(self, targets: Targets) -> Draw | None:
        """How the targets draw that have a temperature, if any have."""
        if not self._table.is_random[targets.host_slots].any():
            return None
        options = targets.options.rows(targets.row)
        return Draw(options.temperature, uniform(options.seed, *targets.counters(targets.row, targets.column)))

    def _from_logits(self, targets: Targets, logits: Tensor, needs: frozenset[str]) -> Prediction:
        """From fp32 logits (T, V), which are changed."""
        table, slots = self._table, targets.host_slots
        targets.restrict(logits)
        ruled = self._ruled_rows(targets)
        scored = None if self._scores_processed else self._scored_tokens(targets, logits)
        if ruled is not None:
            table.rules.apply(logits, ruled)
        if self.processors.applies[slots].any():
            self.processors.apply(logits, targets)
            targets.restrict(logits)
        if self._scores_processed:
            scored = self._scored_tokens(targets, logits)
        largest, tokens = logits.max(-1)
        predicted = Prediction(tokens, largest.isfinite(), scored=scored, ruled=ruled)
        if "confidence" in needs or targets.is_traced:
            logsumexp = logits.logsumexp(-1)
            predicted.confidence = torch.exp(largest - logsumexp)
        if "margin" in needs:
            predicted.margin = margin(logits)
        if "energy" in needs:
            assert predicted.confidence is not None
            predicted.energy = predicted.confidence.log()
        if table.is_random[slots].any():
            self._draw(targets, logits, predicted)
        if targets.is_traced:
            predicted.runner_up = partial(runner_up, logits, logsumexp, predicted.tokens)
        return predicted

    def _draw(self, targets: Targets, logits: Tensor, predicted: Prediction) -> None:
        """Puts drawn tokens in the place of the most probable ones where requests have a temperature."""
        slots = targets.host_slots[targets.host_row]
        random = np.flatnonzero(self._table.is_random[slots])
        index = targets.on_device(random)
        row, of_random = targets.row[index], logits[index]
        options = targets.options.rows(row)
        shaped = self._shape(of_random, options, slots[random])
        tokens = draw(shaped, uniform(options.seed, *targets.counters(row, targets.column[index])))
        predicted.tokens[index] = tokens
        if predicted.confidence is not None:
            predicted.confidence[index] = probability(of_random, tokens)
        if predicted.energy is not None:
            predicted.energy[index] = options.temperature * shaped.logsumexp(-1) - of_random.logsumexp(-1)
        if self._scores_processed and predicted.scored is not None:
            predicted.scored.replace(random, shaped)

    def _shape(self, logits: Tensor, options: RowOptions, host_slots: np.ndarray) -> Tensor:
        """Tempered and filtered logits of rows with a temperature; ``host_slots`` are theirs."""
        if not self._table.is_filtered[host_slots].any():  # the filters sort the vocabulary
            return logits / options.temperature[:, None]
        return temper_and_filter(logits, options)

    def _ruled_rows(self, targets: Targets) -> RuledRows | None:
        """The rows of requests that have rules."""
        ruled = np.flatnonzero(self._table.rules.has_rules[targets.host_slots])
        if not len(ruled):
            return None
        part = targets.take(ruled)
        of_pass = targets.on_device(ruled)
        text = self._states.all_token_ids.gpu[:, : part.rows.host.starts.max()][part.slots]
        prompt_lens = targets.on_device(self._states.prompt_len.np[part.host_slots])
        return RuledRows(
            part.host_slots,
            part.slots,
            of_pass,
            text,
            prompt_lens,
            part.starts,
            targets.ahead()[of_pass],
            part.row,
            part.column,
            targets.on_device(targets.positions_of(ruled)),
        )

    def _scored_tokens(self, targets: Targets, logits: Tensor) -> ScoredTokens | None:
        """The tokens of rows that ask for log-probabilities, with their logits as they are now."""
        is_scored = self._table.logprobs.has_logprobs[targets.host_slots] & targets.is_returned
        if not is_scored.any():
            return None
        slots = targets.host_slots[targets.host_row]
        index = np.flatnonzero(is_scored[targets.host_row])
        of_index = logits[targets.on_device(index)]
        return ScoredTokens(index, slots[index], targets.returned_column[index], of_index)
