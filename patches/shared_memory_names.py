"""The executor's message queue without a name on disk (upstream: vllm/v1/executor/multiproc_executor.py)."""

from typing import Any

from vllm_twotower.patches.registry import Patch, call_after, everywhere, serves_two_tower

EXECUTOR = "vllm.v1.executor.multiproc_executor"
RAY = "vllm.v1.executor.ray_executor_v2"
QUEUES = "vllm.distributed.device_communicators.shm_broadcast"
READY = f"{EXECUTOR}:MultiprocExecutor._post_init_executor"
QUEUE_SOURCES = (
    f"{QUEUES}:MessageQueue.wait_until_ready",
    f"{QUEUES}:MessageQueue.create_from_handle",
    f"{QUEUES}:ShmRingBuffer.__init__",
    f"{QUEUES}:ShmRingBuffer.__del__",
)
WHY = (
    "vLLM frees a queue's memory when the queue is collected. A killed rank, or an engine that takes too long to end "
    "and is killed with Python's resource tracker, leaves up to 240 MiB in /dev/shm, until an engine finds no space."
)
REMOVE_WHEN = "vLLM's message queues leave nothing in /dev/shm when their processes are killed"


def install_unlinking() -> None:
    """Take the memory of the executor's queue out of /dev/shm once every rank has mapped it."""

    def remove_name(executor: Any) -> None:
        if serves_two_tower(executor.vllm_config.model_config):
            from vllm_twotower.model.shared_memory import remove_queue_name

            remove_queue_name(executor.rpc_broadcast_mq)

    call_after(READY, remove_name)


PATCHES = (
    Patch(
        name="shared-memory-names-executor",
        target=READY,
        what="MultiprocExecutor and RayExecutorV2, ready, unlink the memory of a TwoTower engine's queue.",
        why=WHY,
        upstream="not reported",
        remove_when=REMOVE_WHEN,
        applies_when=everywhere,
        sources=(
            READY,
            f"{EXECUTOR}:MultiprocExecutor._init_executor",
            f"{RAY}:RayExecutorV2._init_executor",
            *QUEUE_SOURCES,
        ),
        source_sha256={
            "0.32.0": "c90c453ba7699b0bd307567d465dd98b7ae028ad8c6146447f25bc644e6d42c6",
            "0.33.0": "585c22c1c4bc086e3dd32f777cb1d9064bfb90e1eef83a6e94dfa3b2d25d9efd",
        },
        install=install_unlinking,
    ),
)
