"""`vllm-twotower watch` as a user runs it: over a pipe, and in a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from serving import server_environment, wait_until

SECONDS = 240


def watch_command(*arguments: str) -> list[str]:
    return [str(Path(sys.executable).with_name("vllm-twotower")), "watch", *arguments]


def piped(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """The command with its output in a pipe."""
    env = server_environment() | environment
    return subprocess.run(watch_command(*arguments), env=env, capture_output=True, text=True, timeout=SECONDS)


@dataclass
class Terminal:
    """A terminal in which the command runs."""

    process: subprocess.Popen
    master: int
    before: list
    output: str = ""

    def read(self, seconds: float = 0.1) -> None:
        """Adds what comes within some time to the output."""
        if select.select([self.master], [], [], seconds)[0]:
            with suppress(OSError):  # what Linux says when the other end has closed
                self.output += os.read(self.master, 1 << 16).decode(errors="replace")

    def shows(self, text: str) -> bool:
        """Whether the text was written by now, between whatever spaces, lines and colours."""
        self.read()
        return text in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\s", "", self.output)

    def press(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def wait(self) -> int:
        """The exit status, when all output has come and no process of the command's group is left."""
        deadline = time.monotonic() + 60
        while self.process.poll() is None:
            assert time.monotonic() < deadline, "the command did not end"
            self.read()
        self.read()
        wait_until(self._is_empty, "no process is left", 10)
        return self.process.returncode

    def _is_empty(self) -> bool:
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return True
        return False


@contextmanager
def in_terminal(columns: int, rows: int, *arguments: str, **environment: str) -> Iterator[Terminal]:
    """The command in a terminal of a size, which is its controlling one, so that Ctrl-C reaches it."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    inherited = {k: v for k, v in server_environment().items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        watch_command(*arguments),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        env=inherited | {"TERM": "xterm-256color"} | environment,
    )
    try:
        yield Terminal(process, master, termios.tcgetattr(slave))
    finally:
        process.kill()
        process.wait()
        os.close(slave)
        os.close(master)


def assert_left_clean(terminal: Terminal) -> None:
    """The terminal is as it was: cursor, colours, modes; and nothing was complained about."""
    assert terminal.output.rfind("\x1b[?25h") > terminal.output.rfind("\x1b[?25l") >= 0
    assert "Traceback" not in terminal.output
    assert termios.tcgetattr(terminal.master) == terminal.before
    # After the last colour comes its end.
    assert terminal.output.rstrip().endswith("\x1b[?25h")
