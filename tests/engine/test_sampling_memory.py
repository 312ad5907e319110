"""Memory is profiled with requests that ask for all there is: none takes more while the engine runs."""

from __future__ import annotations

import weakref
from typing import Any

import engines
import golden_data
import pytest
import torch
from replay import tensors_in
from torch.utils._python_dispatch import TorchDispatchMode
from vllm import SamplingParams

from vllm_twotower.engine.fill import StepFill
from vllm_twotower.model.context import ContextMambaMixer, UncommittedRead

WIDTH = 16


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made within the block held at once: ``peak``."""

    def __enter__(self) -> PeakMemory:
        self.peak = self._now = 0
        self._alive: set[int] = set()
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        taken = {tensor.untyped_storage()._cdata for tensor in tensors_in(args, kwargs)}
        for tensor in tensors_in(result):
            if (storage := tensor.untyped_storage())._cdata not in taken:
                self._note(storage)
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._alive:
            self._alive.add(storage._cdata)
            self._now += storage.nbytes()
            self.peak = max(self.peak, self._now)
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self._now -= size


def test_no_request_takes_more_than_was_profiled(monkeypatch: pytest.MonkeyPatch) -> None:
    demanding = [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 5, "top_p": 0.9, "min_p": 0.1},
        {"temperature": 1.0, "top_p": 0.9, "logprobs": 20, "frequency_penalty": 1.0, "logit_bias": {7: 2.0}},
        {"temperature": 1.0, "min_p": 0.1, "logprobs": 20, "repetition_penalty": 1.2, "min_tokens": 5},
        {"temperature": 0, "logprobs": 20, "presence_penalty": 1.0, "allowed_token_ids": list(range(9, 99))},
    ]
    with engines.running_engine(golden_data.checkpoint("A"), max_num_seqs=8) as llm:
        runner = engines.runner(llm)
        hidden_states = runner._dummy_run(256, skip_attn=True, is_profile=True)[1]
        with PeakMemory() as profiled:
            runner._dummy_sampler_run(hidden_states)
        measured = []

        def watch(name: str) -> None:
            sample = getattr(StepFill, name)

            def watched(*args: Any) -> None:
                with PeakMemory() as used:
                    sample(*args)
                measured.append(used.peak)

            monkeypatch.setattr(StepFill, name, watched)

        watch("_add_next_tokens")
        watch("_add_drafted")
        watch("_add_canvases")
        for mode in ("mask_diffusion", "ar", "verified"):
            for options in demanding:
                params = SamplingParams(max_tokens=16, ignore_eos=True, extra_args={"diffusion_mode": mode}, **options)
                engines.generate(llm, [list(range(5, 35))] * 8, [params] * 8)
    assert len(measured) > 50
    assert profiled.peak >= max(measured)


def test_what_drafts_keep_is_profiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every Mamba layer, until they are verified."""
    commit, seen = ContextMambaMixer.commit, set()

    def compare(mixer: ContextMambaMixer, read: UncommittedRead, counts: torch.Tensor) -> None:
        profiled = mixer.blank_read(*read.scanned.dt.shape[:2])
        for name, kept in vars(read.scanned).items():
            blank = getattr(profiled, name)
            assert (blank.shape, blank.dtype) == (kept.shape, kept.dtype)
            assert blank.untyped_storage().nbytes() == kept.untyped_storage().nbytes()
        seen.add(mixer.prefix)
        commit(mixer, read, counts)

    monkeypatch.setattr(ContextMambaMixer, "commit", compare)
    with engines.running_engine(golden_data.checkpoint("A"), {"mode": "verified"}, max_num_seqs=8) as llm:
        engines.generate(llm, [list(range(5, 35))] * 3, [SamplingParams(max_tokens=16, ignore_eos=True)] * 3)
        runner = engines.runner(llm)
        runner._dummy_run(256, skip_attn=True, is_profile=True)
        kept = runner.model.compute_logits(torch.zeros(0)).kept
    assert len(kept) == len(seen) > 0
    assert {scanned.dt.shape[:2] for scanned in kept} == {(256 // WIDTH, WIDTH)}
