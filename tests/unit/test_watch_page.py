"""The page and the picture of `vllm-twotower watch` in a browser: layout, not pixels, and what its player does."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from serving import wait_until
from test_watch import HOSTILE, Words, drafts, long_recording, recorded, two_blocks
from watch_traces import context_chunk

from vllm_twotower.watch.page import page
from vllm_twotower.watch.picture import picture
from vllm_twotower.watch.recording import Recording

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
QUIET = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
PARTS = ("header", "text", "canvas", "status", "controls", "race", "legend", "order")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as driver:
        home = tmp_path_factory.mktemp("browser")
        running = driver.chromium.launch(
            executable_path=CHROMIUM, args=QUIET.split(), env={**os.environ, "HOME": str(home)}
        )
        yield running
        running.close()


@pytest.fixture
def opened(browser: playwright.Browser, tmp_path: Path) -> Iterator[Callable[..., playwright.Page]]:
    """Opens a page in a window. What it complains about, or asks the network for, fails the test at its end."""
    complaints: list[object] = []
    windows = []

    def open_page(text: str, viewport: dict[str, int] = DESKTOP, **options: str) -> playwright.Page:
        file = tmp_path / "page.html"
        file.write_text(text, encoding="utf-8")
        found = browser.new_page(viewport=viewport, reduced_motion="reduce", **options)
        windows.append(found)
        found.on("pageerror", lambda error: complaints.append(error))
        found.on("console", lambda message: complaints.append(message.text))
        found.on("request", lambda request: request.url.startswith("file:") or complaints.append(request.url))
        found.on("dialog", lambda dialog: complaints.append("a script of the text ran"))
        found.goto(file.as_uri())
        return found

    yield open_page
    for window in windows:
        window.close()
    assert complaints == []


def rival() -> Recording:
    return recorded(Words(" x", " y", " z"), *(context_chunk(0.2 * (i + 1), [10 + i]) for i in range(3)), mode="ar")


def box(page_: playwright.Page, part: str) -> dict[str, float]:
    found = page_.locator(f'[data-part="{part}"]').bounding_box()
    assert found is not None, f"{part} is not seen"
    return found


def moment(page_: playwright.Page) -> int:
    return int(page_.locator("body").get_attribute("data-moment"))


def canvas(page_: playwright.Page) -> list[str]:
    """The canvas's tokens, masks as _."""
    cells = page_.locator('[data-part="canvas"] .token')
    return cells.evaluate_all("found => found.map(e => e.classList.contains('mask') ? '_' : e.textContent.trim())")


@pytest.mark.parametrize(("viewport", "scheme"), [(PHONE, "dark"), (DESKTOP, "light")], ids=["phone", "desktop"])
def test_the_layout(opened, tmp_path, viewport, scheme) -> None:
    shown = opened(page(long_recording(4), rival()), viewport, color_scheme=scheme)
    for _ in range(9):
        shown.click('[data-do="step"]')
    boxes = [box(shown, part) for part in PARTS]
    # One below the other, none over another, none beyond the sides.
    for above, below in zip(boxes, boxes[1:], strict=False):
        assert above["y"] + above["height"] <= below["y"] + 0.5
    for found in boxes:
        assert found["x"] >= 0
        assert found["x"] + found["width"] <= viewport["width"]
        assert found["height"] > 15
    assert shown.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    assert boxes[PARTS.index("controls")]["y"] < viewport["height"]

    cells = shown.locator('[data-part="canvas"] .cell')
    places = [cells.nth(i).bounding_box() for i in range(16)]
    columns = 16 if viewport is DESKTOP else 8
    assert len({round(place["y"]) for place in places}) == 16 // columns
    for left, right in zip(places, places[1:], strict=False):
        assert left["x"] + left["width"] <= right["x"] + 0.5 or left["y"] + left["height"] <= right["y"] + 0.5
    for control in ("play", "back", "step", "speed", "scrub"):
        size = shown.locator(f'[data-do="{control}"]').bounding_box()
        assert size["height"] >= 38, f"{control} is too small for a finger"

    ink, paper = shown.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
        ".map(c => c.match(/\\d+/g).slice(0, 3).reduce((sum, x) => sum + Number(x), 0))"
    )
    assert (ink < paper) == (scheme == "light")
    assert abs(ink - paper) > 450
    shown.screenshot(path=tmp_path / "page.png", full_page=True)
    assert (tmp_path / "page.png").stat().st_size > 20_000


def test_step_and_scrub_change_what_is_seen(opened) -> None:
    shown = opened(page(two_blocks()))
    assert canvas(shown) == ["_"] * 4
    shown.click('[data-do="step"]')
    assert canvas(shown) == ["one", "_", "_", "three"]
    assert "block 1, pass 1 of 2, 2 of 4 decided" in shown.inner_text('[data-part="status"]')
    shown.click('[data-do="step"]')
    assert canvas(shown) == ["one", "two", ",", "three"]
    shown.click('[data-do="back"]')
    assert moment(shown) == 1
    shown.locator('[data-do="scrub"]').fill("4")
    assert canvas(shown) == ["four", "\u23ce", "</s>", "cut"]
    assert shown.inner_text('[data-part="text"]').startswith("Prompt: one two, three four")
    shown.locator('[data-do="scrub"]').fill("5")
    assert canvas(shown) == []
    assert "finished" in shown.inner_text('[data-part="status"]')
    assert "23 tokens/s" in shown.inner_text('[data-part="status"]')


def test_a_mask_takes_the_room_of_its_token(opened) -> None:
    """So nothing moves when a token is decided."""
    shown = opened(page(two_blocks()))
    places = "found => found.map(e => Math.round(e.getBoundingClientRect().left))"
    masks = shown.locator('[data-part="text"] .token').evaluate_all(places)
    shown.click('[data-do="step"]')
    shown.click('[data-do="step"]')
    assert shown.locator('[data-part="text"] .token').evaluate_all(places) == pytest.approx(masks, abs=1)


def test_the_player_plays_and_pauses(opened) -> None:
    shown = opened(page(long_recording(2), rival()))
    shown.locator('[data-do="speed"]').select_option("4")
    shown.click('[data-do="play"]')
    assert shown.inner_text('[data-do="play"]') == "Pause"
    wait_until(lambda: moment(shown) >= 3, "the player plays")
    shown.click('[data-do="play"]')
    stopped = moment(shown)
    shown.wait_for_timeout(400)
    assert moment(shown) == stopped
    shown.click('[data-do="play"]')
    wait_until(lambda: shown.inner_text('[data-do="play"]') == "Play", "the player stops at the end")
    assert shown.inner_text('[data-part="rival"]').split() == ["x", "y", "z"]
    assert "finished" in shown.inner_text('[data-part="status"]')


def test_the_keyboard_plays_and_steps(opened) -> None:
    shown = opened(page(two_blocks()))
    for key, expected in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", 5), ("Home", 0)):
        shown.keyboard.press(key)
        assert moment(shown) == expected
    shown.keyboard.press("Space")
    wait_until(lambda: moment(shown) >= 1, "the player plays")


def test_hover_and_focus_show_what_is_known_of_a_token(opened) -> None:
    shown = opened(page(two_blocks()))
    tip = shown.locator("#tip")
    assert not tip.is_visible()
    shown.keyboard.press("End")
    shown.hover('[data-part="text"] .token >> nth=1')
    for words in ('" two"', "confidence 40.0 %", "runner-up 6.0 %", "decided in pass 2 of block 1"):
        assert words in tip.inner_text()
    shown.mouse.move(2, 2)
    assert not tip.is_visible()
    shown.keyboard.press("Home")
    shown.focus('[data-part="canvas"] .token >> nth=3')
    assert "not decided yet" in tip.inner_text()
    assert "position 4" in shown.locator('[data-part="canvas"] .token >> nth=3').get_attribute("aria-label")
    window = tip.bounding_box()
    assert window["x"] >= 0
    assert window["x"] + window["width"] <= DESKTOP["width"]


def test_the_order_of_unmasking_leads_to_its_pass(opened) -> None:
    shown = opened(page(two_blocks()))
    cells = shown.locator('[data-part="order"] [data-jump]')
    assert cells.all_inner_texts() == ["1", "2", "2", "1", "1", "1", "1", "1"]
    shades = cells.evaluate_all("found => found.map(e => e.style.background)")
    assert shades[0] == shades[3] != shades[1] == shades[2]
    cells.nth(1).click()
    assert moment(shown) == 2
    assert "confidence 40.0 %" in shown.inner_text("#tip")


def test_drafts_show_what_was_accepted_and_rejected(opened) -> None:
    shown = opened(page(drafts()))
    for _ in range(3):
        shown.click('[data-do="step"]')
    states = shown.locator('[data-part="canvas"] .token').evaluate_all("found => found.map(e => e.className)")
    assert states == ["token accepted", "token accepted", "token context", "token rejected"]
    rejected = shown.locator('[data-part="canvas"] .rejected')
    assert rejected.evaluate("e => getComputedStyle(e).textDecorationLine") == "line-through"
    assert "verified" in shown.inner_text('[data-part="status"]')


def test_hostile_texts_are_only_text(opened) -> None:
    words = [HOSTILE, " <img src=x onerror=alert(1)>", ",", " three", " four", "\n", "</script>", "<!--"]
    recording = two_blocks(HOSTILE, words)
    recording.model = HOSTILE
    shown = opened(page(recording, recording), PHONE)
    shown.keyboard.press("End")
    assert '"</script><script>alert(1)</script>' in shown.inner_text('[data-part="text"]')
    assert shown.locator("script").count() == 2
    assert shown.locator("img").count() == 0
    assert shown.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_the_picture_moves_as_an_image(browser, tmp_path) -> None:
    (tmp_path / "block.svg").write_text(picture(two_blocks(), rival()), encoding="utf-8")
    shown = browser.new_page(viewport=DESKTOP)
    (tmp_path / "readme.html").write_text('<body style="background:#0d1117"><img src="block.svg">', encoding="utf-8")
    shown.goto((tmp_path / "readme.html").as_uri())
    assert shown.evaluate("document.images[0].naturalWidth") > 600
    first = shown.screenshot(path=tmp_path / "first.png")
    shown.wait_for_timeout(1500)
    assert shown.screenshot(path=tmp_path / "second.png") != first
