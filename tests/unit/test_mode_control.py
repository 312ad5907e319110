"""The choice between the modes learns from steps: with seconds that are made up, it finds the faster one."""

from __future__ import annotations

from typing import Any

import golden_data
import pytest

pytest.importorskip("vllm")
from vllm import EngineArgs

import vllm_twotower
from vllm_twotower.config import EngineOptions
from vllm_twotower.engine import mode_control
from vllm_twotower.engine.mode_control import MIN_DWELL, ModeControl
from vllm_twotower.engine.rows import RowWork


def made_control() -> ModeControl:
    vllm_twotower.register()
    arguments = {"model": str(golden_data.checkpoint("A")), "dtype": "float32", "max_model_len": 256}
    config = EngineArgs(**arguments).create_engine_config()
    return ModeControl(config, EngineOptions.of(config.model_config))


class Engine:
    """Steps of eight requests, in whatever mode is chosen, that take as long as ``seconds`` says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float], passes: int = 4):
        self.control = made_control()
        self.seconds, self.passes, self.step, self.now = seconds, passes, 0, 0.0
        monkeypatch.setattr(mode_control.time, "perf_counter", lambda: self.now)

    def run(self, steps: int) -> list[str]:
        """The modes chosen."""
        modes = []
        for _ in range(steps):
            self.step += 1
            mode = self.control.choose(self.step, 8, 50.0).mode
            work = RowWork(50, 1, 0, 16, 1) if mode == "ar" else RowWork(50, 0, 1, 16, 0)
            blocks = [] if mode == "ar" or self.step % self.passes else [self.passes] * 8
            self.control.step_starts()
            self.now += self.seconds[mode]
            self.control.step_ends([work] * 8, blocks)
            modes.append(mode)
        return modes


@pytest.mark.parametrize(
    ("seconds", "faster"),
    [({"ar": 0.01, "mask_diffusion": 0.02}, "mask_diffusion"), ({"ar": 0.01, "mask_diffusion": 0.1}, "ar")],
    ids=["diffusion", "ar"],
)
def test_the_faster_mode_is_found(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float], faster: str) -> None:
    """16 steps of 10 ms against 4 of 20 or 100 ms."""
    engine = Engine(monkeypatch, seconds)
    assert set(engine.run(10 * MIN_DWELL)[-5 * MIN_DWELL :]) == {faster}
    assert engine.control.take_changes() <= 2
    assert engine.control.take_changes() == 0


def test_a_change_of_the_machine_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"ar": 0.01, "mask_diffusion": 0.02}
    engine = Engine(monkeypatch, seconds)
    assert engine.run(10 * MIN_DWELL)[-1] == "mask_diffusion"
    seconds["mask_diffusion"] = 0.2
    assert engine.run(10 * MIN_DWELL)[-1] == "ar"


def test_one_decision_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many requests are at a border."""
    control = Engine(monkeypatch, {}).control
    first = control.choose(1, 8, 50.0)
    assert control.choose(1, 1, 500.0) is first
    assert control.choose(2, 1, 500.0) is not first


def test_unused_ends_of_blocks_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of 17 tokens take two blocks of 16."""
    control = Engine(monkeypatch, {}).control
    load: Any = control._load(8, 50.0)
    assert (load.block_use, load.prompt_tokens) == (1.0, 0.0)
    for _ in range(100):
        control.request_ends(prompt_tokens=30, output_tokens=17)
    control.request_ends(prompt_tokens=30, output_tokens=0)  # aborted before its first token
    load = control._load(8, 50.0)
    assert (load.prompt_tokens, load.output_tokens) == pytest.approx((30, 17))
    assert load.block_use == pytest.approx(17 / 32)


def test_a_step_in_which_it_is_made_is_measured_from_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first ``auto`` request arrives while a step is scheduled."""
    now, measured = [5000.0], []
    monkeypatch.setattr(mode_control.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(mode_control.HardwareFit, "add", lambda self, work, seconds, forget: measured.append(seconds))
    control = made_control()
    now[0] += 0.25
    control.step_ends([RowWork(50, 1, 0, 16, 1)], [])
    assert measured == [0.25]
