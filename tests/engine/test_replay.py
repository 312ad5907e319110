"""Passes can be captured: each is recorded once for a number of rows, and replayed in the place of all that follow.

A real engine serves random requests. Before each of its passes the same pass is made on buffers of a fixed number of
rows, by replay and as it is, from the same memory: both must give the same bits, and what the engine's own pass gives.
"""

from __future__ import annotations

import gc
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from engines import generate, runner, running_engine, tokens_of
from golden_data import GOLDEN
from random_requests import draw_prompt
from replay import Recording, tensors_in
from torch import Tensor
from torch_layers import torch_attention, torch_layers
from vllm import LLM, SamplingParams
from vllm._custom_ops import CPUDNNLGEMMHandler
from vllm.forward_context import set_forward_context

from vllm_twotower.engine.fill import fill_canvases
from vllm_twotower.engine.model_state import TwoTowerModelState
from vllm_twotower.engine.pass_buffers import PassBuffers
from vllm_twotower.engine.pass_plan import PassPlan
from vllm_twotower.engine.tower_rows import DeviceRows, TowerRows
from vllm_twotower.kernels import seeded_mamba
from vllm_twotower.model import time_conditioning

BUCKETS = (1, 2, 4, 8)
WIDTH = 16
NO_ROWS = TowerRows(*(np.zeros(0, dtype=np.int64) for _ in range(3)))


@dataclass(frozen=True)
class Kind:
    """One of the passes that are captured."""

    name: str
    width: int
    run: int = 0
    """Which of the runs of a pass it is."""


READ, NEXT = Kind("16 tokens", WIDTH), Kind("1 token", 1)
DRAFT, CANVAS = Kind("draft", WIDTH, run=1), Kind("canvas", WIDTH, run=2)


class Replayer:
    """Makes the passes of a running engine by replay too."""

    def __init__(self, llm: LLM):
        worker, cpu = runner(llm), torch.device("cpu")
        self.state: TwoTowerModelState = worker.model_state
        self.table, self.decision = self.state.table, worker.sampler._decision
        self.layers = self.state.vllm_config.compilation_config.static_forward_context
        self.buffers = PassBuffers(8, cpu)
        self.plan_towers = self.state.planner.plan_towers
        model = self.state.model
        self.caches = [cache for layer in self.layers.values() for cache in tensors_in(layer.kv_cache)]
        self.known = [
            *self.caches,
            *model.parameters(),
            *(tensor for module in model.modules() for tensor in tensors_in(list(vars(module).values()))),
            *model.buffers(),
            *vars(self.table.options).values(),
            self.table.canvas,
            self.table.step,
            self.buffers._host,
            worker.req_states.all_token_ids.gpu,
            *worker.block_tables.input_block_tables,
            # Constants that are made once in a process.
            *(linear.handler_tensor for linear in gc.get_objects() if type(linear) is CPUDNNLGEMMHandler),
            seeded_mamba._no_later(WIDTH, cpu),
            time_conditioning._cached_frequencies(cpu),
        ]
        self.recordings: dict[tuple[str, int], Recording] = {}
        self.replays: Counter[tuple[str, int]] = Counter()
        self.seen: Counter[str] = Counter()

    def plan(
        self, step: Any, context: DeviceRows, drafts: DeviceRows, denoiser: DeviceRows, gets_token: np.ndarray
    ) -> PassPlan:
        """In the place of the model state's: first makes its pass by replay."""
        of_kind = {
            CANVAS: denoiser.host,
            DRAFT: drafts.host,
            READ: context.host.take(np.flatnonzero((context.host.lengths == WIDTH) & ~gets_token)),
            NEXT: context.host.take(np.flatnonzero((context.host.lengths == 1) & gets_token)),
        }
        for kind, rows in of_kind.items():
            slots = step.rows.slots[rows.batch_rows]
            is_plain = ~self.table.needs_logits(slots) & (self.table.strategy[slots] == 0)
            if len(rows) and is_plain.all():
                self._note(kind, rows)
                self._compare(replace(step, plan=None), kind, rows)
        return self.plan_towers(step, context, drafts, denoiser, gets_token)

    def _note(self, kind: Kind, rows: TowerRows) -> None:
        page = self.state.planner.state_block_size
        self.seen["rows that fill up"] += len(rows) not in BUCKETS
        if kind.run > 0:
            self.seen[f"short {kind.name}"] += bool((rows.lengths < WIDTH).any())
        self.seen["fresh prompt"] += kind.run == 0 and bool((rows.starts == 0).any())
        self.seen["page border"] += bool((rows.starts // page != (rows.ends - 1) // page).any())
        self.seen["first token of a page"] += bool((rows.starts % page == 0).any())

    def _compare(self, step: Any, kind: Kind, rows: TowerRows) -> None:
        bucket = next(bucket for bucket in BUCKETS if bucket >= len(rows))
        key, before = (kind.name, bucket), [cache.clone() for cache in self.caches]

        def made_by(make: Callable[[], dict[str, Tensor]]) -> tuple[dict[str, Tensor], list[Tensor]]:
            """The rows' results, and the caches then, which are put back."""
            results = {name: value.clone()[: len(rows)] for name, value in make().items()}
            after = [cache.clone() for cache in self.caches]
            for cache, value in zip(self.caches, before, strict=True):
                cache.copy_(value)
            return results, after

        with torch_layers(self.layers, self.state.planner.state_block_size):
            exact, eager = (
                made_by(partial(self._pass, step, *self._send(step, kind, rows, shape)))
                for shape in (None, (bucket, kind.width))
            )
            sent = self._send(step, kind, rows, (bucket, kind.width))
            if key not in self.recordings:
                made_by(lambda: self._record(key, lambda: self._pass(step, *sent)))
            replayed = made_by(self.recordings[key].replay)
        self.replays[key] += 1
        for name, value in eager[0].items():
            assert torch.equal(replayed[0][name], value), (key, name)
            of_rows = exact[0][name]  # as wide as the longest canvas
            value = value[tuple(map(slice, of_rows.shape))]
            torch.testing.assert_close(value, of_rows, rtol=1e-4, atol=1e-4, msg=f"{key} {name}")
        for with_replay, as_it_is, without_padding in zip(replayed[1], eager[1], exact[1], strict=True):
            assert torch.equal(with_replay, as_it_is), key
            torch.testing.assert_close(as_it_is, without_padding, rtol=1e-4, atol=1e-4)

    def _record(self, key: tuple[str, int], run: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        self.recordings[key] = Recording(run, self.known)
        return self.recordings[key].result

    def _send(self, step: Any, kind: Kind, rows: TowerRows, bucket: tuple[int, int] | None) -> list[DeviceRows]:
        runs, buckets = [NO_ROWS] * 3, [None] * 3
        runs[kind.run], buckets[kind.run] = rows, bucket
        return self.buffers.send(step.rows.slots, *runs, buckets)

    def _pass(self, step: Any, *runs: DeviceRows) -> dict[str, Tensor]:
        """A pass from what was sent to what it decides, by row (R, ...)."""
        [rows] = [run for run in runs if len(run)]
        gets_token = np.full(len(runs[0].host), rows.width == 1)
        plan, state = self.plan_towers(step, *runs, gets_token), self.state
        with set_forward_context({}, state.vllm_config, num_tokens=plan.num_tokens):
            logits = state.model.run(plan)
        if plan.canvases is not None:
            [(part, predicted)] = self.decision.predict(
                plan.canvases, logits.denoiser, logits.denoiser_head, logits.tile, frozenset({"confidence"})
            )
            filled = fill_canvases(part, predicted, self.table.rules)
            return {"hidden": logits.denoiser.view(len(rows), rows.width, -1), **vars(filled)}
        if plan.drafted is not None:
            [(part, predicted)] = self.decision.predict(plan.drafted, logits.drafts, logits.context_head, logits.tile)
            tokens = predicted.tokens.view(len(rows), -1)
            counts = part.num_new(tokens)
            state.planner.advance_states(plan, counts)
            return {"hidden": logits.drafts.view(len(rows), rows.width, -1), "tokens": tokens, "counts": counts}
        if plan.next_tokens is None:
            return {}
        [(_, predicted)] = self.decision.predict(plan.next_tokens, logits.context, logits.context_head, logits.tile)
        return {"hidden": logits.context, "tokens": predicted.tokens, "is_finite": predicted.is_finite}


def draw_requests(rng: random.Random) -> list[list[tuple[list[int], SamplingParams]]]:
    """Batches of greedy requests: blocks that are filled in step, token by token, and all sorts together.

    Prompts share beginnings, so that pages are found.
    """
    shared = rng.choices(range(4, 300), k=80)

    def draw_one(max_tokens: int, **options: Any) -> tuple[list[int], SamplingParams]:
        prompt = draw_prompt(rng) if rng.random() < 0.6 else shared[: rng.choice((40, 64, 70, 80))]
        return prompt, SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, extra_args=options)

    batches = []
    for size in (7, 4, 2, 1):
        batches.append([draw_one(40, diffusion_max_steps=1) for _ in range(size)])
        batches.append([draw_one(6, diffusion_mode="ar") for _ in range(size)])
        batches.append([draw_one(6, diffusion_mode="verified") for _ in range(size)])
    mixed = [draw_one(rng.randint(1, 40), diffusion_mode="ar") for _ in range(4)]
    mixed += [draw_one(20, diffusion_mode="verified", diffusion_canvas_length=rng.choice((9, 16))) for _ in range(3)]
    for _ in range(8):
        threshold, length = rng.choice((0.02, 0.1, 0.8)), rng.choice((WIDTH, rng.randint(1, WIDTH)))
        options = {"diffusion_confidence_threshold": threshold, "diffusion_canvas_length": length}
        mixed.append(draw_one(rng.randint(1, 40), **options))
    return [*batches, mixed]


@pytest.mark.parametrize("checkpoint", ["A", pytest.param("C", marks=pytest.mark.slow)])
def test_passes_are_replayed(checkpoint: str) -> None:
    """Every kind of pass for every number of rows; and the engine's tokens are those of its own attention."""
    batches = [tuple(zip(*requests, strict=True)) for requests in draw_requests(random.Random(7))]
    options = {"enable_prefix_caching": True, "max_model_len": 256, "block_size": 64, "kv_cache_memory_bytes": 8 << 20}
    model = GOLDEN / f"ckpt_{checkpoint}"
    with running_engine(model, **options) as llm:
        expected = [tokens_of(generate(llm, *batch)) for batch in batches]
    with torch_attention(), running_engine(model, **options) as llm, pytest.MonkeyPatch.context() as patch:
        replayer = Replayer(llm)
        patch.setattr(replayer.state.planner, "plan_towers", replayer.plan)
        replayed = [tokens_of(generate(llm, *batch)) for batch in batches]
    assert replayed == expected
    assert set(replayer.replays) == {(kind.name, rows) for kind in (CANVAS, DRAFT, READ, NEXT) for rows in BUCKETS}
    assert min(replayer.replays.values()) > 1, replayer.replays
    assert all(replayer.seen.values()), replayer.seen
