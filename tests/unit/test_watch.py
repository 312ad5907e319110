"""What `vllm-twotower watch` shows of a recording: frames, lines in a terminal, the page's text and the picture."""

from __future__ import annotations

import io
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence

import pytest
from watch_traces import MASK, block_chunk, context_chunk, draft_chunk

from vllm_twotower.watch.look import flow, printable, width_of
from vllm_twotower.watch.page import page
from vllm_twotower.watch.picture import picture
from vllm_twotower.watch.recording import Chunk, Recording, timeline
from vllm_twotower.watch.terminal import Screen, hidden_cursor, is_plain, plain_lines

M = MASK
HOSTILE = 'Say "</script><script>alert(1)</script><!-- &amp; \x1b[31m\x00 __DATA__ __TITLE__ ]]>'


class Words:
    """A tokenizer of bytes: token ids from 10 on are the words of a text, some of them parts of characters."""

    def __init__(self, *words: str | bytes):
        self.words = [word.encode() if isinstance(word, str) else word for word in words]

    def __call__(self, token_ids: Sequence[int]) -> str:
        return b"".join(self.words[i - 10] for i in token_ids).decode(errors="replace")

    def ids(self) -> list[int]:
        return [*range(10, 10 + len(self.words))]


def recorded(decode: Words, *chunks: Chunk, mode: str = "mask_diffusion", prompt: str = "Prompt:") -> Recording:
    recording = Recording(prompt, "a-model", mode, decode, {"threshold": 0.8})
    for chunk in chunks:
        recording.add(chunk)
    recording.finish()
    return recording


def two_blocks(prompt: str = "Prompt:", words: Sequence[str | bytes] | None = None) -> Recording:
    """Two blocks of four: the first in two passes, the second in one, whose last token is behind the end."""
    decode = Words(*(words or [" one", " two", ",", " three", " four", "\n", "</s>", " cut"]))
    a, b, c, d, e, f, g, h = decode.ids()
    first = block_chunk(0.2, 0, [[a, M, M, d], [a, b, c, d]], [0.995, 0.4, 0.6, 0.95])
    second = block_chunk(0.3, 4, [[e, f, g, h]], [0.8, 0.99, 1.0])
    return recorded(decode, first, second, prompt=prompt)


def drafts() -> Recording:
    """A token from the prompt's pass, a draft of which two of three tokens stay, one of which all stay."""
    decode = Words(" a", " b", " c", " d", " e", " f", " g")
    a, b, c, d, e, f, g = decode.ids()
    return recorded(
        decode,
        context_chunk(0.1, [a]),
        draft_chunk(0.2, 1, a, [b, c, d], 2, e),
        draft_chunk(0.3, 4, e, [f], 1, g),
        mode="verified",
    )


def states(recording: Recording) -> list[str]:
    """The canvas of every frame, one letter a cell."""
    letters = {"mask": "_", "new": "N", "kept": "k", "accepted": "a", "rejected": "x", "context": "c", "cut": "-"}
    return ["".join(letters[cell.state] for cell in frame.cells) for frame in recording.frames]


def test_the_frames_of_filled_blocks() -> None:
    recording = two_blocks()
    assert states(recording) == ["____", "N__N", "kNNk", "____", "NNN-", ""]
    assert recording.completion == " one two, three four\n</s>"
    assert [cell.decided_in for cell in recording.text] == [1, 2, 2, 1, 1, 1, 1]
    assert [cell.block for cell in recording.text] == [1, 1, 1, 1, 2, 2, 2]
    assert [frame.tokens for frame in recording.frames] == [0, 0, 0, 4, 4, 7]
    assert recording.passes == 3
    # A mask has the text of the token that will stand there, but not what is known of it.
    mask = recording.frames[1].cells[1]
    assert (mask.text, mask.confidence, mask.decided_in) == (" two", None, None)


def test_passes_are_spread_over_the_time_of_their_block() -> None:
    recording = two_blocks()
    seconds = [frame.seconds for frame in recording.frames]
    assert seconds == pytest.approx([0, 0.2 / 3, 0.4 / 3, 0.2, 0.25, 0.3])
    assert recording.times == pytest.approx([0.2] * 4 + [0.3] * 3)
    assert recording.rate() == pytest.approx(7 / 0.3)
    assert recording.rate(4) == pytest.approx(4 / 0.2)


def test_the_frames_of_verified_drafts() -> None:
    recording = drafts()
    assert states(recording) == ["", "___", "NNN", "aacx", "_", "N", "ac", ""]
    assert recording.completion == " a b c e f g"
    assert [cell.state for cell in recording.text] == [
        "context",
        "accepted",
        "accepted",
        "context",
        "accepted",
        "context",
    ]
    assert [cell.text for cell in recording.frames[3].cells] == [" b", " c", " e", " d"]
    # Two passes of the denoiser and two of verification; the first token comes with the prompt's pass.
    assert recording.passes == 4


def test_tokens_that_share_a_character_are_joined() -> None:
    decode = Words(" price", " ", "\u20ac".encode()[:1], "\u20ac".encode()[1:], b"\xff", " end")
    recording = recorded(decode, context_chunk(0.5, decode.ids()), mode="ar")
    assert recording.completion.replace("\ufffd", "?") == " price \u20ac? end"
    assert [frame.seconds for frame in recording.frames[:2]] == pytest.approx([0.5 / 6, 1.0 / 6])
    assert recording.passes == 6


def test_a_chunk_that_goes_on_with_a_block_adds_its_tokens() -> None:
    """A block's tokens may come in parts, each with the block."""
    decode = Words(" a", " b", " c", " d")
    whole = block_chunk(0.2, 0, [decode.ids()], [0.9] * 4)
    parts = [
        Chunk(0.1 + 0.1 * i, whole.token_ids[2 * i : 2 * i + 2], whole.trace.part(2 * i, 2 * i + 2)) for i in (0, 1)
    ]
    recording = recorded(decode, *parts)
    assert recording.completion == " a b c d"
    assert [cell.state for cell in recording.text] == ["kept"] * 4


def test_a_race_is_seen_at_its_true_speed() -> None:
    recording = two_blocks()
    rival = recorded(Words(" x", " y"), context_chunk(0.25, [10]), context_chunk(0.5, [11]), mode="ar")
    moments = timeline(recording, rival)
    assert [moment.seconds for moment in moments] == sorted(moment.seconds for moment in moments)
    assert {id(moment.frame) for moment in moments} == {id(frame) for frame in recording.frames}
    assert [(m.frame.tokens, m.rival_tokens) for m in moments] == [(0, 0)] * 3 + [(4, 0), (4, 1), (7, 1), (7, 2)]


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def __init__(self, encoding: str = "utf-8"):
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self) -> str:
        return self._encoding

    def isatty(self) -> bool:
        return True


def rows_of(drawn: str, width: int) -> list[str]:
    """The rows of a terminal after what was written to it: text, wrapping, and the few sequences that are used."""
    rows, row, column = [""], 0, 0
    for found in re.finditer(r"\x1b\[(\??[0-9;]*)([A-Za-z])|([^\x1b])", drawn):
        number, command, character = found.groups()
        if command == "F":
            row, column = max(0, row - int(number)), 0
        elif command == "J":
            rows = [*rows[:row], rows[row][:column]]
        elif command == "K":
            rows[row] = rows[row][:column]
        elif command in ("m", "h", "l"):
            continue
        elif character == "\n":
            row, column = row + 1, 0
        else:
            if column >= width:
                row, column = row + 1, 0
            rows += [""] * (row + 1 - len(rows))
            rows[row] = rows[row][:column].ljust(column) + character + rows[row][column + 1 :]
            column += 1
        rows += [""] * (row + 1 - len(rows))
    return rows


@pytest.mark.parametrize("width", [20, 40, 120])
@pytest.mark.parametrize("race", [False, True])
def test_lines_fit_into_the_terminal(width: int, race: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    recording = two_blocks("A prompt with many words and averyveryverylongonewithoutaspace \u4f60\u597d\u4f60\u597d:")
    rival = (
        recorded(Words(" x", " y"), context_chunk(0.25, [10]), context_chunk(0.5, [11]), mode="ar") if race else None
    )
    screen = Screen(Terminal(), {})
    for moment in timeline(recording, rival):
        for height in (10, 30, None):
            lines = screen.lines(recording, moment, rival, width, height)
            assert height is None or len(lines) <= height
            assert all(sum(width_of(text) for text, _ in line) <= width for line in lines)
    words = "".join(text for line in lines for text, _ in line)
    for expected in ("one", "three", "</s>", "7 tokens", "23 tokens/s"):
        assert expected in words.replace("\n", "") or expected.split()[0] in words


@pytest.mark.parametrize(("width", "height"), [(20, 40), (40, 24), (120, 24)])
def test_a_frame_replaces_the_one_before(width: int, height: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("LINES", str(height))
    recording = two_blocks()
    stream, alone = Terminal(), Terminal()
    moments = timeline(recording)
    screen = Screen(stream, {})
    for moment in moments:
        screen.draw(recording, moment, last=moment is moments[-1])
    Screen(alone, {}).draw(recording, moments[-1], last=True)
    shown = rows_of(stream.getvalue(), width)
    assert shown == rows_of(alone.getvalue(), width)
    assert "mask_diffusion" in "".join(shown)


def test_colours_follow_the_confidence_and_the_environment() -> None:
    recording = two_blocks()
    moment = timeline(recording)[2]

    def drawn(**environment: str) -> str:
        stream = Terminal()
        Screen(stream, environment).draw(recording, moment)
        return stream.getvalue()

    assert "48;2;" in drawn(COLORTERM="truecolor")
    assert "48;2;" not in drawn()
    assert "48;5;" in drawn()
    without = drawn(NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*(3|4)[0-9][0-9;]*m", without)
    assert "confidence" not in without
    assert " two" in re.sub(r"\x1b\[[0-9;]*m", "", without)


def test_a_terminal_without_unicode_gets_ascii() -> None:
    recording = two_blocks(words=[" one", " tw\u00f6", ",", " three", " four", "\n", "</s>", " cut"])
    stream = Terminal("ascii")
    screen = Screen(stream, {})
    for moment in timeline(recording):
        screen.draw(recording, moment)
    assert stream.getvalue().isascii()
    assert "___" in stream.getvalue()


@pytest.mark.parametrize("unicode", [True, False])
def test_plain_lines_have_a_line_a_pass_and_no_escapes(unicode: bool) -> None:
    words = [" one\x1b[2J", " two", ",", " three", " four", "\n", "</s>", " cut"]
    lines = [
        line
        for moment in timeline(two_blocks(words=words))
        for line in plain_lines(two_blocks(words=words), moment, unicode)
    ]
    mask = "\u2591" if unicode else "_"
    assert [line.partition("|")[0].split() for line in lines] == [
        ["block", "1", "pass", "1/2", "2/4"],
        ["block", "1", "pass", "2/2", "4/4"],
        ["block", "2", "pass", "1/1", "4/4"],
    ]
    assert f" {mask * 3}{mask} three|" in lines[0]
    assert not any(character in line for line in lines for character in "\x1b\n")


def test_plain_lines_of_drafts_show_what_was_rejected() -> None:
    recording = drafts()
    lines = [line for moment in timeline(recording) for line in plain_lines(recording, moment)]
    assert [line.partition("|")[2] for line in lines] == [" a|", " b c d|", " b c e[- d-]|", " f|", " f g|"]
    assert "verified   2/3" in lines[2]


def test_what_is_no_terminal_is_plain() -> None:
    assert is_plain(io.StringIO(), {"TERM": "xterm"})
    assert is_plain(Terminal(), {"TERM": "dumb"})
    assert not is_plain(Terminal(), {"TERM": "xterm"})


def test_the_cursor_comes_back_after_an_error() -> None:
    stream = Terminal()
    with pytest.raises(KeyboardInterrupt), hidden_cursor(stream):
        raise KeyboardInterrupt
    assert stream.getvalue().endswith("\x1b[0m\x1b[?25h")


def test_lines_break_between_words() -> None:
    lines = flow(["Prompt: ", "a b", "cd", " efghijkl", "\n", "m"], 8)
    assert ["".join(piece for _, piece in line) for line in lines] == ["Prompt:", "a bcd", "efghijkl", "m"]
    assert [index for index, _ in lines[1]] == [1, 1, 2]


def test_control_characters_are_not_printed() -> None:
    assert printable("a\x1b[0m\x9b\u202eb\u2028\n") == "a\u00b7[0m\u00b7\u00b7b\u00b7\u23ce\n"


def data_of(text: str) -> dict:
    [found] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return json.loads(found)


def test_a_page_holds_any_text() -> None:
    words = [HOSTILE, " two", ",", " three", " four", "\n", "</script>", "<!--"]
    recording = two_blocks(HOSTILE, words)
    recording.model = HOSTILE
    text = page(recording, recording)
    assert text.count("<script") == text.count("</script>") == 2
    assert "<!--" not in text
    data = data_of(text)
    assert data["prompt"] == printable(HOSTILE, "\n")
    assert "".join(cell[0] for cell in data["text"]) == printable(recording.completion, "\n")
    assert re.search("<title>(.*)</title>", text)[1].count("<") == 0


def test_a_page_needs_nothing_else() -> None:
    text = page(two_blocks())
    assert not re.search(r"(src|href|url|import)\s*[=(]\s*[\"']?(https?:|//|\w+\.(js|css))", text)
    assert "default-src 'none'" in text


def test_the_order_of_unmasking() -> None:
    [first, second] = data_of(page(two_blocks()))["order"]
    assert [cell[4] for cell in first["cells"]] == [1, 2, 2, 1]
    assert (first["block"], first["passes"], first["first"]) == (1, 2, 0)
    assert [cell[1] for cell in second["cells"]] == ["new", "new", "new", "cut"]
    [verdict, _] = data_of(page(drafts()))["order"]
    assert [cell[1] for cell in verdict["cells"]] == ["accepted", "accepted", "rejected"]
    alone = recorded(Words(" x"), context_chunk(0.25, [10]), mode="ar")
    assert data_of(page(alone))["order"] == []


def long_recording(blocks: int, width: int = 16) -> Recording:
    """Blocks that take a pass for every token."""
    decode = Words(*(f" w{i % 97}" for i in range(blocks * width)))
    ids = decode.ids()
    chunks = []
    for block in range(blocks):
        part = ids[block * width : (block + 1) * width]
        canvases = [[token if i <= number else M for i, token in enumerate(part)] for number in range(width)]
        chunks.append(block_chunk(0.1 * (block + 1), block * width, canvases, [0.9] * width))
    return recorded(decode, *chunks)


@pytest.mark.parametrize("make", [two_blocks, drafts, lambda: long_recording(8)])
def test_the_picture_is_small_and_valid(make) -> None:
    recording = make()
    text = picture(recording, recorded(Words(" x", " y"), context_chunk(0.25, [10, 11]), mode="ar"))
    assert len(text.encode()) < 500_000
    root = ET.fromstring(text)
    assert root.tag.endswith("svg")
    words = "".join(root.itertext())
    assert "tokens/s" in words
    assert "prefers-reduced-motion" in words
    assert set(re.findall(r"@keyframes (\w+)", text)) == set(re.findall(r"animation:(k\w+)", text))
    assert "href" not in text


def test_colours_lie_below_texts() -> None:
    """Also where a token's colour comes later than its text, as a draft's does."""
    groups = [element for element in ET.fromstring(picture(drafts())) if element.tag.endswith("}g")]
    has_text = [any(child.tag.endswith("}text") for child in group) for group in groups]
    assert has_text == sorted(has_text)
    has_colour = [any(child.get("fill") for child in group) for group in groups]
    assert not any(text and colour for text, colour in zip(has_text, has_colour, strict=True))


def test_a_picture_holds_any_text() -> None:
    root = ET.fromstring(picture(two_blocks(HOSTILE)))
    assert not [element for element in root.iter() if "script" in element.tag]
    assert "script>" in "".join(root.itertext())


def test_the_last_moment_of_a_picture_stays_without_animations() -> None:
    """Where nothing moves what was decided is seen, and no mask."""
    root = ET.fromstring(picture(two_blocks()))
    style = "".join(element.text for element in root.iter() if element.tag.endswith("style"))
    hidden = set(re.findall(r"\.(k\d+_\d+)\{opacity:0;", style))
    seen = [group for group in root.iter() if group.tag.endswith("}g") and group.get("class") not in hidden]
    words = [text.text for group in seen for text in group.iter() if text.tag.endswith("text")]
    assert {"one", "two", ",", "three", "four", "finished"} <= set(words)
    assert not any("#m" in (rect.get("fill") or "") for group in seen for rect in group.iter())
