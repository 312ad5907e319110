"""No shared memory left behind by an engine of several ranks, however its processes end.

Memory has a name until all who use it have mapped it. Without one it is freed with the last of their processes. vLLM
keeps the names, and frees the memory only where a process ends in order: one that is killed, and Ray's workers, do not.
"""

from __future__ import annotations

from pathlib import Path

from vllm.distributed import get_tp_group
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

DIRECTORY = Path("/dev/shm")


def remove_group_names() -> None:
    """Removes the names of what tensor-parallel ranks exchange tensors and messages through.

    All ranks have mapped it when their group is there.
    """
    group = get_tp_group()
    communicator = group.device_communicator
    if isinstance(communicator, CpuCommunicator) and communicator.supports_tensor_dict:
        (DIRECTORY / f"{communicator.dist_module.group_name}_{communicator.rank}").unlink(missing_ok=True)
    remove_queue_name(group.mq_broadcaster)


def remove_queue_name(queue: MessageQueue | None) -> None:
    """Removes the name of a queue's memory if this process has made it; its readers must be ready."""
    buffer = None if queue is None else queue.buffer
    if buffer is not None and buffer.is_creator:
        buffer.is_creator = False
        buffer.shared_memory.unlink()
