"""Message queues without a name on disk (upstream: vllm/distributed/device_communicators/shm_broadcast.py)."""

from collections.abc import Callable
from typing import Any

from vllm_twotower.patches.registry import followed_by, serves_two_tower


def of_executor(upstream_ready: Callable) -> Callable:
    """Take the memory of the executor's queue out of /dev/shm once every rank has mapped it."""

    def remove_name(executor: Any) -> None:
        if serves_two_tower(executor.vllm_config.model_config):
            from vllm_twotower.model.shared_memory import remove_queue_name

            remove_queue_name(executor.rpc_broadcast_mq)

    return followed_by(upstream_ready, remove_name)


def of_rank(upstream_ready: Callable) -> Callable:
    """Take the memory of the queue that this rank writes out of /dev/shm once the executor has mapped it.

    It is done in the queue: Ray takes an actor's methods as they were before vLLM loaded its plugins.
    """
    from vllm_twotower.model.shared_memory import remove_queue_name

    return followed_by(upstream_ready, remove_queue_name)
