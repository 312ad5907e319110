"""No shared memory left behind by a rank that is killed."""

from __future__ import annotations

from pathlib import Path

from vllm.distributed import get_tp_group
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

DIRECTORY = Path("/dev/shm")


def remove_segment_name() -> None:
    """Removes the name of the segment through which this tensor-parallel rank exchanges tensors on a CPU.

    All ranks have mapped it when their group is there, so the name serves no one any more. The memory is freed with the
    last of the processes, however it ends; vLLM frees it only where one ends in order, which Ray's workers do not.
    """
    communicator = get_tp_group().device_communicator
    if isinstance(communicator, CpuCommunicator) and communicator.supports_tensor_dict:
        (DIRECTORY / f"{communicator.dist_module.group_name}_{communicator.rank}").unlink(missing_ok=True)
