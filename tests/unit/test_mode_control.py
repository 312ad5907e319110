"""The choice between the modes learns from steps: with seconds that are made up, it finds the faster one."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")
from vllm_twotower.engine import mode_control
from vllm_twotower.engine.mode_control import (
    BLOCKS_BETWEEN_TRIES,
    BLOCKS_TO_TRY,
    HOPELESS,
    MARGIN,
    MIN_DWELL,
    BlockMode,
    ModeControl,
)

WIDTH = 16


class Engine:
    """Steps of so many requests, in whatever mode is chosen, a block each in ``seconds[mode]``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: dict[BlockMode, float]):
        self.control, self.seconds, self.step, self.now = ModeControl(WIDTH), seconds, 0, 0.0
        monkeypatch.setattr(mode_control.time, "perf_counter", lambda: self.now)

    def run(
        self, steps: int, num_open: int = 8, passes: int = 4, reads_prompts: bool = False, lossless: bool = False
    ) -> list[BlockMode]:
        """The modes chosen; a block takes so many steps of the denoiser, or one of the context tower."""
        modes = []
        for _ in range(steps):
            self.step += 1
            mode = self.control.choose(self.step, num_open, lossless).mode
            self.control.step_starts()
            if mode == "ar":
                self.now += self.seconds[mode]
                self.control.step_ends({mode: num_open}, num_open * WIDTH, reads_prompts)
            else:
                self.now += self.seconds[mode] / passes
                tokens = 0 if self.step % passes else num_open * WIDTH
                self.control.step_ends({mode: num_open}, tokens, reads_prompts)
            modes.append(mode)
        return modes


def blocks_of(modes: list[BlockMode], mode: BlockMode) -> int:
    return modes.count(mode) if mode == "ar" else modes.count(mode) // 4


@pytest.mark.parametrize("faster", ["ar", "mask_diffusion"])
def test_the_faster_mode_is_found(monkeypatch: pytest.MonkeyPatch, faster: BlockMode) -> None:
    """After a few blocks in either; if it is far slower, the other one is never tried again."""
    engine = Engine(monkeypatch, {"ar": 0.1, "mask_diffusion": 0.1} | {faster: 0.1 / HOPELESS / 1.5})
    engine.run(10 * BLOCKS_TO_TRY)
    assert set(engine.run(8 * BLOCKS_BETWEEN_TRIES)) == {faster}
    assert engine.control.take_changes() <= 2
    assert engine.control.take_changes() == 0


def test_steps_that_all_read_prompts_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they do where many short texts are asked for."""
    engine = Engine(monkeypatch, {"ar": 0.1, "mask_diffusion": 0.3})
    assert engine.run(10 * BLOCKS_TO_TRY, reads_prompts=True)[-1] == "ar"


def test_steps_without_prompts_count_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt is of no mode's making."""
    engine = Engine(monkeypatch, {"ar": 0.1, "mask_diffusion": 0.12})
    engine.run(10 * BLOCKS_TO_TRY)
    engine.seconds["ar"] = 1.0
    engine.run(4, reads_prompts=True)
    engine.seconds["ar"] = 0.1
    assert set(engine.run(MIN_DWELL)) == {"ar"}


def test_each_load_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, {"ar": 0.1, "mask_diffusion": 0.01})
    engine.run(10 * BLOCKS_TO_TRY, num_open=1)
    engine.seconds.update(ar=0.01, mask_diffusion=0.1)
    engine.run(10 * BLOCKS_TO_TRY, num_open=16)
    assert engine.run(4 * MIN_DWELL, num_open=16)[-1] == "ar"
    assert engine.run(4 * MIN_DWELL, num_open=1)[-1] == "mask_diffusion"


def test_nothing_is_tried_under_a_load_that_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when two requests of a closed loop end at once, or all of them one after the other."""
    engine = Engine(monkeypatch, {"ar": 0.1, "mask_diffusion": 0.01})
    engine.run(10 * BLOCKS_TO_TRY, num_open=8)
    for _ in range(20):
        for num_open in (8, 8, 8, 4, 2, 1):
            assert set(engine.run(4, num_open)) == {"mask_diffusion"}
    assert engine.control.take_changes() <= 2


@pytest.mark.parametrize("slower", ["ar", "mask_diffusion"])
def test_a_change_of_the_machine_is_followed(monkeypatch: pytest.MonkeyPatch, slower: BlockMode) -> None:
    """In the mode that is used at once, in the other one when it is tried again, which it is rarely."""
    engine = Engine(monkeypatch, {"ar": 0.1, "mask_diffusion": 0.1} | {slower: 0.15})
    engine.run(10 * BLOCKS_TO_TRY)
    tried = engine.run(4 * BLOCKS_BETWEEN_TRIES)
    assert 0 < blocks_of(tried, slower) < 0.1 * BLOCKS_BETWEEN_TRIES
    engine.seconds[slower] = 0.05
    assert engine.run(6 * BLOCKS_BETWEEN_TRIES)[-1] == slower


def test_small_differences_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, {"ar": 0.1, "mask_diffusion": 0.1})
    engine.run(10 * BLOCKS_TO_TRY)
    engine.control.take_changes()
    engine.seconds["ar"] = 0.1 * (1 - MARGIN / 2)
    engine.run(BLOCKS_BETWEEN_TRIES // 2)
    assert engine.control.take_changes() == 0


def test_one_decision_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many requests start a block."""
    control = Engine(monkeypatch, {}).control
    first = control.choose(1, 8)
    assert control.choose(1, 1) is first
    assert control.choose(2, 1) is not first


def test_steps_of_both_modes_tell_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    control = Engine(monkeypatch, {}).control
    control.step_ends({"ar": 3, "mask_diffusion": 5}, 128)
    control.step_ends({}, 0)
    assert control.choose(1, 8).seconds == {"mask_diffusion": 0, "ar": 0}


def test_a_step_in_which_it_is_made_is_measured_from_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first ``auto`` request arrives while a step is scheduled."""
    now = [5000.0]
    monkeypatch.setattr(mode_control.time, "perf_counter", lambda: now[0])
    control = ModeControl(WIDTH)
    now[0] += 0.25
    control.step_ends({"ar": 1}, WIDTH)
    assert control.choose(1, 1).seconds["ar"] == pytest.approx(0.25)


def test_lossless_requests_choose_for_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between ``ar``, of which all know the same, and ``verified``."""
    seconds: dict[BlockMode, float] = {"ar": 0.2, "mask_diffusion": 0.1, "verified": 0.4}
    engine = Engine(monkeypatch, seconds)
    engine.run(10 * BLOCKS_TO_TRY)
    assert engine.run(MIN_DWELL)[-1] == "mask_diffusion"
    tries = engine.run(10 * BLOCKS_TO_TRY, lossless=True)
    assert set(tries) == {"verified", "ar"}
    assert set(engine.run(MIN_DWELL, lossless=True)) == {"ar"}
    assert engine.run(MIN_DWELL)[-1] == "mask_diffusion"
