"""Tokens are the same whatever a request finds in the prefix cache, and only what was read can be found there."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import golden_data
import pytest
from engines import assert_idle, core, generate, running_engine, tokens_of
from vllm import LLM, SamplingParams

from vllm_twotower.reference import TwoTowerModel, generate_ar, generate_mask_diffusion

MODES = ("mask_diffusion", "ar")
PAGE = 128
"""Tokens of a page of checkpoint A in fp32."""
PAGE_BYTES = 64 << 10

Prompt = tuple[int, ...]


def random_prompt(length: int, seed: int) -> Prompt:
    return tuple(random.Random(seed).choices(range(4, 320), k=length))


@cache
def oracle(checkpoint: str) -> TwoTowerModel:
    return TwoTowerModel.from_pretrained(golden_data.checkpoint(checkpoint))


@dataclass(frozen=True)
class Task:
    """A request, and the tokens that the plain model gives."""

    prompt: Prompt
    max_tokens: int
    mode: str = "mask_diffusion"
    width: int = 16
    checkpoint: str = "A"

    def params(self, **options: Any) -> SamplingParams:
        extra = {"diffusion_mode": self.mode}
        if self.mode == "mask_diffusion":
            extra["diffusion_canvas_length"] = self.width
        return SamplingParams(temperature=0, ignore_eos=True, max_tokens=self.max_tokens, extra_args=extra, **options)

    @property
    def tokens(self) -> Prompt:
        return reference(self)


@cache
def reference(task: Task) -> Prompt:
    model = oracle(task.checkpoint)
    if task.mode == "mask_diffusion":
        result = generate_mask_diffusion(model, task.prompt, task.max_tokens, block_size=task.width)
    else:
        result = generate_ar(model, task.prompt, task.max_tokens)
    return tuple(result.tokens)


def run(llm: LLM, tasks: Sequence[Task], **options: Any) -> list[int]:
    """The tasks all at once: their tokens are right. Returns how many tokens each found in the cache."""
    outputs = generate(llm, [task.prompt for task in tasks], [task.params() for task in tasks], **options)
    assert tokens_of(outputs) == [task.tokens for task in tasks]
    return [output.num_cached_tokens for output in outputs]


def whole_pages(num_tokens: int) -> int:
    return num_tokens // PAGE * PAGE


@dataclass
class Served:
    llm: LLM
    retains: bool
    """Whether states of generated text are cached."""

    def found_after(self, task: Task) -> int:
        """The tokens that a longer prompt with the task's text finds."""
        if not self.retains:
            return whole_pages(len(task.prompt) - 1)
        total = len(task.prompt) + task.max_tokens
        if task.mode != "mask_diffusion":
            return whole_pages(total - 1)
        end = len(task.prompt) + -(-task.max_tokens // task.width) * task.width
        return whole_pages(end - task.width)


@pytest.fixture(scope="module", params=[0, PAGE], ids=["prompts", "all"])
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    """Prefix caching is on by default; then of prompts, or of generated text too."""
    interval = request.param
    options = {"prefix_cache_retention_interval": interval} if interval else {}
    with running_engine(golden_data.checkpoint("A"), **options) as llm:
        assert core(llm).scheduler.block_size == PAGE
        yield Served(llm, bool(interval))
        assert_idle(llm)


@pytest.fixture
def empty(served: Served) -> Served:
    """With nothing in the cache."""
    assert served.llm.reset_prefix_cache()
    return served


def test_shared_prefixes(empty: Served) -> None:
    """At once, then one after the other, then longer ones."""
    stems = [random_prompt(length, length) for length in (128, 200, 257, 384)]
    tasks = [
        Task(stem + random_prompt(tail, tail), 20, mode)
        for (stem, tail), mode in zip(itertools.product(stems, (0, 3, 40, 90)), itertools.cycle(MODES), strict=False)
    ]
    random.Random(1).shuffle(tasks)
    assert sum(run(empty.llm, tasks)) > 0
    for task in tasks:
        assert run(empty.llm, [task]) == [whole_pages(len(task.prompt) - 1)]
    longer = [Task(task.prompt + random_prompt(9, 9), 20, task.mode) for task in tasks]
    assert sum(run(empty.llm, longer)) >= sum(whole_pages(len(task.prompt) - 1) for task in tasks)


@pytest.mark.parametrize("mode", MODES)
def test_requests_that_come_together_share(empty: Served, mode: str) -> None:
    """The first one's prompt is found in the step after it is read, before any other is."""
    task = Task(random_prompt(PAGE + 20, 2), 20, mode)
    found = run(empty.llm, [task] * 3)
    assert found == [0, PAGE, PAGE]


@pytest.mark.parametrize("mode", MODES)
def test_turns(empty: Served, mode: str) -> None:
    """A prompt, its answer, more; three times. Lengths and widths are such that blocks lie across pages' ends."""
    tasks = [Task(random_prompt(length, length), 40, mode, width) for length, width in ((100, 16), (241, 7), (350, 13))]
    found = [0] * len(tasks)
    for turn in range(3):
        assert run(empty.llm, tasks) == found
        found = [empty.found_after(task) for task in tasks]
        more = random_prompt(30, turn)
        tasks = [Task(task.prompt + task.tokens + more, 40 + 8 * turn, mode, task.width) for task in tasks]
    assert any(found)


@pytest.mark.parametrize("mode", MODES)
def test_around_the_end_of_a_page(empty: Served, mode: str) -> None:
    """Prompts that end before, at and behind it; what follows them ends before, at and behind it too."""
    lengths = [PAGE + offset for offset in (-18, -16, -13, -9, -2, 0, 1, 2)]
    tasks = [Task(random_prompt(length, length), 24, mode) for length in lengths]
    run(empty.llm, tasks)
    for more in (0, 1, 20):
        run(empty.llm, [Task(task.prompt + task.tokens + random_prompt(more, more), 20, mode) for task in tasks])


@pytest.mark.parametrize("last", ["ends the page", "lies across its end"])
def test_a_block_that_was_not_read_is_not_found(empty: Served, last: str) -> None:
    """Nobody reads the last block: its tokens must not be served."""
    task = Task(random_prompt(2 * PAGE - (48 if last == "ends the page" else 40), 5), 48)
    assert run(empty.llm, [task]) == [0]
    found = PAGE
    assert empty.found_after(task) == found
    for more in (1, 30):
        again = Task(task.prompt + task.tokens + random_prompt(more, more), 20)
        [got] = run(empty.llm, [again])
        assert got == found
        found = 2 * PAGE  # now it was part of a prompt


@pytest.mark.parametrize("mode", MODES)
def test_aborted_in_a_block(empty: Served, mode: str) -> None:
    """What a request leaves when it is aborted after any step is what the context tower read of it."""
    engine = empty.llm.llm_engine
    for length, steps in ((PAGE, 1), (PAGE, 2), *((PAGE - 8, steps) for steps in (1, 2, 3, 7, 8, 9, 16))):
        whole = Task(random_prompt(length, 3), 40, mode)
        text = whole.prompt + whole.tokens
        empty.llm.reset_prefix_cache()
        engine.add_request("aborted", {"prompt_token_ids": list(whole.prompt)}, whole.params())
        for _ in range(steps):
            engine.step()
        engine.abort_request(["aborted"])
        while engine.has_unfinished_requests():
            engine.step()
        run(empty.llm, [Task(text[: PAGE + 1], 12, mode), Task(text, 12, mode)])


def test_stopped_in_a_block(empty: Served) -> None:
    """Tokens behind the stop were read, but are not the request's."""
    whole = Task(random_prompt(2 * PAGE - 24, 7), 48)
    for position in (20, 26, 31, 40):
        empty.llm.reset_prefix_cache()
        stop = whole.tokens[position]
        tokens = whole.tokens[: whole.tokens.index(stop) + 1]
        [output] = generate(empty.llm, [whole.prompt], [whole.params(stop_token_ids=[stop])])
        assert tokens_of([output]) == [tokens]
        run(empty.llm, [Task(whole.prompt + tokens + random_prompt(40, position), 20)])


def test_prompt_logprobs_read_the_whole_prompt(empty: Served) -> None:
    task = Task(random_prompt(2 * PAGE + 10, 8), 20)
    run(empty.llm, [task])
    [output] = generate(empty.llm, [task.prompt], [task.params(prompt_logprobs=0)])
    assert output.num_cached_tokens == 0
    assert len(output.prompt_logprobs) == len(task.prompt)
    assert tokens_of([output]) == [task.tokens]
    assert run(empty.llm, [task]) == [2 * PAGE]


def test_preemption_and_eviction(monkeypatch: pytest.MonkeyPatch) -> None:
    """With few pages and priorities, requests are thrown out in any step, resumed from their own pages, and what
    finished ones left is evicted."""
    options = {"max_num_batched_tokens": 192, "max_model_len": 512, "kv_cache_memory_bytes": 28 * PAGE_BYTES}
    with running_engine(
        golden_data.checkpoint("A"),
        prefix_cache_retention_interval=PAGE,
        scheduling_policy="priority",
        **options,
    ) as llm:
        scheduler, found, evicted = core(llm).scheduler, [], []
        manager, pool = scheduler.kv_cache_manager, scheduler.kv_cache_manager.block_pool
        look_up, evict = manager.get_computed_blocks, pool._maybe_evict_cached_block

        def spied_look_up(request: Any, *args: Any) -> Any:
            result = look_up(request, *args)
            if request.num_preemptions:
                found.append(result[1])
            return result

        def spied_evict(block: Any) -> bool:
            evicted.append(evict(block))
            return evicted[-1]

        monkeypatch.setattr(manager, "get_computed_blocks", spied_look_up)
        monkeypatch.setattr(pool, "_maybe_evict_cached_block", spied_evict)
        stems = [random_prompt(length, length) for length in (100, 180, 250)]
        tasks = [
            Task(stem + random_prompt(tail, tail), 70, mode)
            for (stem, tail), mode in zip(itertools.product(stems, (0, 20, 33)), itertools.cycle(MODES), strict=False)
        ]
        for turn in range(2):
            order = random.Random(turn).sample(range(len(tasks)), len(tasks))
            run(llm, [tasks[i] for i in order], priority=[i % 4 for i in range(len(order))])
            tasks = [Task(task.prompt + task.tokens[:60], 40, task.mode) for task in tasks]
        assert any(found)
        assert any(evicted)
        assert_idle(llm)


def test_a_prompt_beside_blocks_is_read_in_parts_of_pages() -> None:
    """It does not wait for steps with room for a whole page, and its pages are found all the same."""
    with running_engine(golden_data.checkpoint("A"), {"prompt_tokens_beside_blocks": 32}) as llm:
        engine, ends = llm.llm_engine, []
        blocks = [Task(random_prompt(9, seed), 400) for seed in range(4)]
        late = Task(random_prompt(2 * PAGE + 44, 4), 8)

        def step() -> None:
            ends.extend(output for output in engine.step() if output.finished)

        for i, task in enumerate(blocks):
            engine.add_request(str(i), {"prompt_token_ids": list(task.prompt)}, task.params())
        for _ in range(4):
            step()
        engine.add_request("late", {"prompt_token_ids": list(late.prompt)}, late.params())
        while engine.has_unfinished_requests():
            step()
        assert ends[0].request_id == "late"
        assert tokens_of(ends[:1]) == [late.tokens]
        assert run(llm, [late]) == [2 * PAGE]


@pytest.mark.parametrize("checkpoint", ["B", "C"])
def test_other_checkpoints(checkpoint: str) -> None:
    with running_engine(golden_data.checkpoint(checkpoint), prefix_cache_retention_interval=None) as llm:
        page = core(llm).scheduler.block_size
        tasks = [Task(random_prompt(page - 20, 1), 60, mode, checkpoint=checkpoint) for mode in MODES]
        assert sum(run(llm, tasks)) == 0
        longer = [Task(task.prompt + task.tokens + task.prompt, 30, task.mode, checkpoint=checkpoint) for task in tasks]
        assert run(llm, longer) == [page] * len(longer)
        assert run(llm, longer) == [2 * page] * len(longer)
        assert_idle(llm)
