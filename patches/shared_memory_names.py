"""Message queues of ranks without a name on disk (upstream: vllm/v1/executor/multiproc_executor.py).

Their memory is in /dev/shm until they are collected. A killed rank, or an engine that takes too long to end and is
killed with Python's resource tracker, leaves up to 240 MiB there, until an engine finds no space.
"""

import functools
from typing import Any

from vllm_twotower.patches.registry import Patch, everywhere, locate, replace, serves_two_tower

EXECUTOR = "vllm.v1.executor.multiproc_executor"
RAY = "vllm.v1.executor.ray_executor_v2"
QUEUES = "vllm.distributed.device_communicators.shm_broadcast"
READY = f"{EXECUTOR}:MultiprocExecutor._post_init_executor"
LOOP = f"{EXECUTOR}:WorkerProc.worker_busy_loop"


def install_for_executor() -> None:
    """Take the memory of the executor's queue out of /dev/shm once every rank has mapped it."""
    holder, name = locate(READY)
    upstream_post_init = getattr(holder, name)

    @functools.wraps(upstream_post_init)
    def post_init_executor(self: Any) -> None:
        upstream_post_init(self)
        if serves_two_tower(self.vllm_config.model_config):
            from vllm_twotower.model.shared_memory import remove_queue_name

            remove_queue_name(self.rpc_broadcast_mq)

    replace(READY, post_init_executor)


def install_for_rank() -> None:
    """Take the memory of a rank's queues out of /dev/shm once the executor has mapped it."""
    holder, name = locate(LOOP)
    upstream_loop = getattr(holder, name)

    @functools.wraps(upstream_loop)
    def worker_busy_loop(self: Any) -> None:
        if serves_two_tower(self.worker.vllm_config.model_config):
            from vllm_twotower.model.shared_memory import remove_queue_name

            remove_queue_name(self.worker_response_mq)
        upstream_loop(self)

    replace(LOOP, worker_busy_loop)


_MEMORY = (f"{QUEUES}:ShmRingBuffer.__init__", f"{QUEUES}:ShmRingBuffer.__del__")
_WHY = "A process that is killed leaves the memory of its queue in /dev/shm."
_REMOVE_WHEN = "vLLM's message queues leave nothing in /dev/shm when their processes are killed"

PATCHES = (
    Patch(
        name="shared-memory-names-executor",
        target=READY,
        what="MultiprocExecutor and RayExecutorV2, ready, unlink the memory of a TwoTower engine's broadcast queue.",
        why=_WHY,
        upstream="not reported",
        remove_when=_REMOVE_WHEN,
        applies_when=everywhere,
        sources=(
            READY,
            f"{EXECUTOR}:MultiprocExecutor._init_executor",
            f"{RAY}:RayExecutorV2._init_executor",
            *_MEMORY,
        ),
        source_sha256={
            "0.32.0": "6a75de0e257a0325f7b851e2326c3a3758208b6d0af85e7f80049916565af81f",
            "0.33.0": "2986da2876c2505aa42c268898827b660e4078db3cfbc03ab8e5ca95b7cb6150",
        },
        install=install_for_executor,
    ),
    Patch(
        name="shared-memory-names-rank",
        target=LOOP,
        what="WorkerProc, ready, unlinks the memory of a TwoTower rank's response queue.",
        why=_WHY,
        upstream="not reported",
        remove_when=_REMOVE_WHEN,
        applies_when=everywhere,
        sources=(LOOP, f"{EXECUTOR}:WorkerProc.worker_main", f"{RAY}:RayWorkerProc.run", *_MEMORY),
        source_sha256={
            "0.32.0": "cdc626a29c9e9e117a26678631e2109d8024c2869518c4c224e9873f06c763c1",
            "0.33.0": "b8a9ca384c700335dbe213602ef1d37f4d60725ba827b16c42f570ccf018ba8d",
        },
        install=install_for_rank,
    ),
)
