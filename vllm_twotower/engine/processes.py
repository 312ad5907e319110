"""What an engine's processes must not do when others end: take signals for their own, or stay."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
import time

import torch.multiprocessing
from vllm.logger import init_logger

logger = init_logger(__name__)

ENGINE = "EngineCore"
"""How the names of vLLM's engine processes begin."""
SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_TO_SHUT_DOWN = 10.0


@functools.cache
def keep_signals_of_forked_processes() -> None:
    """From now on no forked process passes its signals on to the event loop of the process it was forked from.

    It inherits the file descriptor to which Python writes them: a SIGTERM for a rank would shut the server down.
    """
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))


def end_engine_with_its_parent() -> None:
    """If this is an engine's own process, it ends after the process that it serves, however that ends.

    vLLM's stays, with its ranks and the server's port, if the API server is killed.
    """
    if multiprocessing.current_process().name.startswith(ENGINE):
        threading.Thread(target=_end_after, args=(os.getppid(),), daemon=True, name="ParentMonitor").start()


def end_rank_with_its_engine() -> None:
    """If an engine's own process has started this rank, the system kills the rank when that process has ended.

    vLLM's engine waits for its ranks before it ends, and kills those that hang or are stopped; a SIGTERM in this time
    ends it before, and they stay. Other processes are left out: the system does this at the end of the thread that has
    started the rank.
    """
    engine = multiprocessing.parent_process()
    if engine is not None and engine.name.startswith(ENGINE):
        torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGKILL)  # type: ignore[attr-defined]  # made in C
        if os.getppid() != engine.pid:  # it has ended before
            os._exit(1)


def _end_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    logger.error("The process that this engine serves has ended, so the engine ends too.")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SECONDS_TO_SHUT_DOWN)
    os._exit(1)
