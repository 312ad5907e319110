"""A rank's message queue without a name on disk (upstream: vllm/distributed/device_communicators/shm_broadcast.py)."""

from vllm_twotower.patches.registry import Patch, call_after
from vllm_twotower.patches.shared_memory_names import QUEUE_SOURCES, QUEUES, REMOVE_WHEN, WHY

READY = f"{QUEUES}:MessageQueue.wait_until_ready"


def install_unlinking() -> None:
    """Take the memory of the queue that this rank writes out of /dev/shm once the executor has mapped it.

    It is done in the queue: Ray takes an actor's methods as they were before vLLM loaded its plugins.
    """
    from vllm_twotower.model.shared_memory import remove_queue_name

    call_after(READY, remove_queue_name)


def in_one_of_several_ranks() -> bool:
    """In a process that is one rank of several, and so serves nothing else."""
    from vllm.distributed import get_tp_group, model_parallel_is_initialized

    return model_parallel_is_initialized() and get_tp_group().world_size > 1


PATCHES = (
    Patch(
        name="shared-memory-names-rank",
        target=READY,
        what="MessageQueue.wait_until_ready also unlinks the memory of the queue, if this process has made it.",
        why=WHY,
        upstream="not reported",
        remove_when=REMOVE_WHEN,
        applies_when=in_one_of_several_ranks,
        sources=QUEUE_SOURCES,
        source_sha256=dict.fromkeys(
            ("0.32.0", "0.33.0"), "87a0cee33b9a1ef352ea7f5bebdbf7c3e3177549261bbf224a4e8cb310736eda"
        ),
        install=install_unlinking,
    ),
)
