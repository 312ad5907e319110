"""`vllm-twotower watch` with an engine of its own, and its recordings against what the engine returns."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator

import pytest
from engines import assert_idle, running_engine
from serving import wait_until
from watching import assert_left_clean, in_terminal, piped

from vllm_twotower.models import embedded_model
from vllm_twotower.trace import TRACE
from vllm_twotower.watch.recording import Recording
from vllm_twotower.watch.sources import OfflineSource, WatchError

HARD = (
    "Question: Rosa has 17 baskets with 25 coins each and Tom has 13 with 41 each. How many coins are there?\nAnswer:"
)
EASY = "Question: Sam has 14 shells, buys 76 more and gives 28 to Noah. How many shells are left?\nAnswer:"
ANSWER = " 14 + 76 = 90. 90 - 28 = 62. He has 62 shells left. The answer is 62."


@pytest.fixture(scope="module")
def source() -> Iterator[OfflineSource]:
    with running_engine(embedded_model()) as llm:
        yield OfflineSource(llm, "tiny")


def recorded(source: OfflineSource, prompt: str, mode: str, **options: object) -> Recording:
    recording = Recording(prompt, "tiny", mode, source.decode)
    wanted = {"diffusion_mode": mode, TRACE: "passes", **options}
    for chunk in source.chunks(prompt, wanted, temperature=0, max_tokens=90):
        recording.add(chunk)
    recording.finish()
    return recording


@pytest.mark.parametrize("mode", ["mask_diffusion", "verified", "ar"])
def test_a_recording_has_the_text_and_every_pass(source: OfflineSource, mode: str) -> None:
    from vllm import SamplingParams

    options = {} if mode == "ar" else {"diffusion_confidence_threshold": 0.99}
    recording = recorded(source, HARD, mode, **options)
    params = SamplingParams(
        temperature=0, max_tokens=90, skip_special_tokens=False, extra_args={"diffusion_mode": mode, **options}
    )
    [output] = source._llm.generate(HARD, params, use_tqdm=False)
    assert recording.completion == output.outputs[0].text + "</s>"
    assert len(recording.text) == len(output.outputs[0].token_ids)
    assert recording.times == sorted(recording.times)
    assert [frame.seconds for frame in recording.frames] == sorted(frame.seconds for frame in recording.frames)
    assert all(0 < cell.confidence <= 1 for cell in recording.text)
    passes = [frame for frame in recording.frames if frame.number and not frame.verified]
    if mode == "ar":
        assert passes == []
        assert recording.passes == len(recording.text)
        return
    verdicts = [frame for frame in recording.frames if frame.verified]
    assert recording.passes == len(passes) + len(verdicts)
    assert bool(verdicts) == (mode == "verified")
    # Every token of a filled block was a mask first, and is what the text then has.
    for before, after in zip(recording.frames, recording.frames[1:], strict=False):
        if before.cells and after.number > 1 and not after.verified:
            undecided = [cell.state == "mask" for cell in before.cells]
            assert sum(undecided) > sum(cell.state == "mask" for cell in after.cells)
            changed = [cell.state == "new" for cell in after.cells]
            assert all(was for was, now in zip(undecided, changed, strict=True) if now)
    if mode == "mask_diffusion":
        assert len(passes) > 3, "the prompt is too easy to show several passes"
        for frame in passes:
            if frame.number == frame.of:
                stays = [cell for cell in frame.cells if cell.state != "cut"]
                returned = recording.text[frame.tokens : frame.tokens + len(stays)]
                assert [cell.text for cell in stays] == [cell.text for cell in returned]
                assert [cell.decided_in for cell in stays] == [cell.decided_in for cell in returned]
                assert [cell.confidence for cell in stays] == [cell.confidence for cell in returned]


def test_a_request_that_nobody_looks_at_any_more_is_aborted(source: OfflineSource) -> None:
    chunks = source.chunks(HARD, {TRACE: "passes"}, temperature=0, max_tokens=90)
    next(chunks)
    chunks.close()
    assert_idle(source._llm)


def test_a_refusal_is_told_in_words(source: OfflineSource) -> None:
    with pytest.raises(WatchError, match="diffusion_confidence_threshold=2"):
        next(source.chunks(HARD, {"diffusion_confidence_threshold": 2}, max_tokens=9))


def test_watch_over_a_pipe(tmp_path) -> None:
    page, picture = tmp_path / "out.html", tmp_path / "out.svg"
    done = piped("--race", "--html", str(page), "--svg", str(picture), EASY)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "\x1b" not in done.stdout
    blocks = [line for line in done.stdout.splitlines() if re.match(r"block +\d+ +pass +\d+/\d+ +\d+/16 \|.*\|$", line)]
    assert len(blocks) >= 3
    rates = re.findall(r"tiny-twotower, (\w+): (\d+) tokens, ([0-9.]+) tokens a pass, (\d+) tokens/s", done.stdout)
    assert [rate[0] for rate in rates] == ["mask_diffusion", "ar"]
    assert float(rates[0][2]) > float(rates[1][2]) == 1.0
    assert done.stdout.count(ANSWER) == 2
    assert "14 shells" in page.read_text()
    assert 0 < picture.stat().st_size < 500_000
    assert "finished" in "".join(ET.parse(picture).getroot().itertext())


def test_ctrl_c_in_a_narrow_terminal_leaves_it_clean() -> None:
    with in_terminal(40, 20, "--delay", "0.4", HARD, "--confidence-threshold", "0.99") as terminal:
        wait_until(lambda: terminal.shows("pass3of"), "some passes are shown", 120)
        terminal.press("\x03")
        assert terminal.wait() == 130
        assert_left_clean(terminal)
        assert "\x1b[2J" not in terminal.output, "what stood in the terminal before stays"


def test_a_model_without_a_denoiser_is_named() -> None:
    with running_engine(embedded_model(), {"towers": "context"}) as llm, pytest.raises(WatchError, match="denoiser"):
        next(OfflineSource(llm, "tiny").chunks(EASY, {"diffusion_mode": "mask_diffusion", TRACE: "passes"}))
