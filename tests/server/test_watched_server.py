"""`vllm-twotower watch --server` against a running server."""

from __future__ import annotations

import re

import pytest
from serving import Server, free_port, wait_until
from watching import assert_left_clean, in_terminal, piped

EASY = "Question: Sam has 14 shells, buys 76 more and gives 28 to Noah. How many shells are left?\nAnswer:"
ANSWER = " 14 + 76 = 90. 90 - 28 = 62. He has 62 shells left. The answer is 62."
RUNNING = "vllm:num_requests_running"


@pytest.mark.parametrize("mode", ["mask_diffusion", "verified", "ar"])
def test_a_server_is_watched(tiny_server: Server, mode: str, tmp_path) -> None:
    race = [] if mode == "ar" else ["--race"]
    page = tmp_path / "out.html"
    done = piped("--server", tiny_server.url, "--mode", mode, *race, "--html", str(page), EASY)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert f"tiny-twotower, {mode}: 40 tokens" in done.stdout
    assert done.stdout.count(ANSWER) == 1 + len(race)
    wanted = {"mask_diffusion": r"block +\d+ +pass", "verified": r"block +\d+ +verified", "ar": r"token +\d+ "}
    assert len(re.findall(f"(?m)^{wanted[mode]}", done.stdout)) >= 3
    assert "14 shells" in page.read_text()


def test_the_model_may_be_named(tiny_server: Server) -> None:
    done = piped("--server", f"{tiny_server.url}/v1/", tiny_server.model, EASY)
    assert done.returncode == 0, done.stderr
    assert ANSWER in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--confidence-threshold", "2"], "diffusion_confidence_threshold=2"),
        (["--max-tokens", "100000"], "max_tokens"),
        (["another", EASY], "another"),
    ],
)
def test_refusals_are_told_in_words(tiny_server: Server, arguments: list[str], words: str) -> None:
    done = piped("--server", tiny_server.url, *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("vllm-twotower watch: ")
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_no_server() -> None:
    done = piped("--server", f"127.0.0.1:{free_port()}", EASY)
    assert done.returncode == 1
    assert "does not answer" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("columns", [20, 40, 120])
def test_ctrl_c_ends_the_request_and_leaves_the_terminal_clean(tiny_server: Server, columns: int) -> None:
    options = ("--mode", "ar", "--max-tokens", "2000", "--delay", "0.2")
    with in_terminal(columns, 20, "--server", tiny_server.url, *options, EASY) as terminal:
        wait_until(lambda: terminal.shows(" 1") or terminal.shows("14"), "some tokens are shown")
        terminal.press("\x03")
        assert terminal.wait() == 130
        assert_left_clean(terminal)
    wait_until(lambda: tiny_server.metrics()[RUNNING] == 0, "the server is idle")
    assert tiny_server.answers()


def test_a_reader_that_goes_away(tiny_server: Server) -> None:
    """As with `watch | head -1`."""
    import subprocess

    from serving import server_environment
    from watching import watch_command

    command = " ".join(map(repr, watch_command("--server", tiny_server.url, EASY))).replace("\\n", " ")
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | head -1"],
        env=server_environment(),
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("tiny-twotower, mask_diffusion")
    assert done.stderr == ""
