"""Message queues of ranks without a name on disk (upstream: vllm/distributed/device_communicators/shm_broadcast.py)."""

import functools
from typing import Any

from vllm_twotower.patches.registry import Patch, everywhere, locate, replace

QUEUES = "vllm.distributed.device_communicators.shm_broadcast"
READY = f"{QUEUES}:MessageQueue.wait_until_ready"


def install_unlinking() -> None:
    """Take a queue's memory out of /dev/shm once every reader has mapped it: it is freed with the last of them."""
    holder, name = locate(READY)
    upstream_ready = getattr(holder, name)

    @functools.wraps(upstream_ready)
    def wait_until_ready(self: Any) -> None:
        upstream_ready(self)
        buffer = self.buffer if self._is_writer else None
        if buffer is not None and buffer.is_creator:
            buffer.is_creator = False
            buffer.shared_memory.unlink()

    replace(READY, wait_until_ready)


PATCHES = (
    Patch(
        name="shared-memory-names",
        target=READY,
        what="MessageQueue.wait_until_ready also unlinks the writer's memory, which all readers have mapped.",
        why="vLLM unlinks it when the queue is collected. A killed rank, or an engine that takes too long to end and "
        "is killed with Python's resource tracker, leaves up to 240 MiB in /dev/shm, until an engine finds no space.",
        upstream="not reported",
        remove_when="vLLM's message queues leave nothing in /dev/shm when their processes are killed",
        applies_when=everywhere,
        sources=(
            READY,
            f"{QUEUES}:MessageQueue.create_from_handle",
            f"{QUEUES}:ShmRingBuffer.__init__",
            f"{QUEUES}:ShmRingBuffer.__del__",
        ),
        source_sha256=dict.fromkeys(
            ("0.32.0", "0.33.0"), "87a0cee33b9a1ef352ea7f5bebdbf7c3e3177549261bbf224a4e8cb310736eda"
        ),
        install=install_unlinking,
    ),
)
