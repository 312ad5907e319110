"""Over how many ranks a model can be divided, and whether Ray has devices for them."""

from __future__ import annotations

import logging
import os
import socket
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_twotower.checkpoint import TwoTowerConfig

TENSOR_PARALLEL_SIZES = (1, 2, 4, 8)
"""What plans and inspections show."""
_LARGEST = 64
_VOCAB_PADDING = 64  # vLLM's VocabParallelEmbedding


def check_tensor_parallel_size(config: TwoTowerConfig, size: int) -> None:
    """Raises ValueError if the heads, groups or widths of the model cannot be divided over ``size`` ranks.

    The error names the dimension, its value and the sizes that fit. The rules are vLLM's: KV heads may be replicated,
    one Mamba group may be, the vocabulary is padded.
    """
    if obstacle := tensor_parallel_obstacle(config, size):
        fitting = [str(n) for n in range(1, _LARGEST + 1) if not tensor_parallel_obstacle(config, n)]
        raise ValueError(f"{obstacle}; sizes that fit: {', '.join(fitting)}")


def tensor_parallel_obstacle(config: TwoTowerConfig, size: int) -> str | None:
    """The first dimension that cannot be divided over ``size`` ranks, in words; None if all can."""
    dimensions = []
    if "*" in config.pattern:
        dimensions += ["num_attention_heads"]
        key_value_heads = config.num_key_value_heads
        if key_value_heads % size and size % key_value_heads:
            return f"{size} and num_key_value_heads ({key_value_heads}): one must divide the other"
    if "M" in config.pattern:
        dimensions += ["mamba_num_heads"] + (["n_groups"] if config.n_groups > 1 else [])
    if "E" in config.pattern:
        dimensions += ["moe_intermediate_size", "moe_shared_expert_intermediate_size"]
    if "-" in config.pattern:
        dimensions += ["intermediate_size"]
    for name in dimensions:
        if getattr(config, name) % size:
            return f"{size} does not divide {name} ({getattr(config, name)})"
    padded = -(-config.vocab_size // _VOCAB_PADDING) * _VOCAB_PADDING
    return f"{size} does not divide vocab_size ({config.vocab_size}), padded to {padded}" if padded % size else None


def check_ray_devices(needed: int, patience: float = 20.0) -> None:
    """Raises ValueError unless the running Ray cluster has ``needed`` devices free, or in ``patience`` seconds.

    vLLM itself would wait half an hour. Devices of an engine that was just ended take a moment to come free. Without a
    cluster, vLLM starts one on a machine with GPUs; on CPUs that would have no devices.
    """
    import ray
    from vllm.platforms import current_platform

    device, joins = current_platform.ray_device_key, not ray.is_initialized()
    if joins:
        try:
            _probe_cluster()
            ray.init("auto", log_to_driver=False, logging_level=logging.ERROR)
        except OSError as error:
            if current_platform.is_cpu() or "RAY_ADDRESS" in os.environ:
                how = f"vllm-twotower ray-up --ranks {needed}" if current_platform.is_cpu() else "see `ray status`"
                raise ValueError(
                    f"distributed_executor_backend='ray' needs a Ray cluster, and none runs at RAY_ADDRESS "
                    f"({os.environ.get('RAY_ADDRESS', 'not set')}) or on this machine: {how} ({error})"
                ) from None
            return
    try:
        deadline = time.monotonic() + patience
        while (free := ray.available_resources().get(device, 0)) < needed:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"{needed} ranks need as many {device}s of the Ray cluster, of which {free:g} are free "
                    f"(of {ray.cluster_resources().get(device, 0):g}); see `ray status`"
                )
            time.sleep(0.5)
    finally:
        if joins:
            ray.shutdown()


def _probe_cluster() -> None:
    """Raises OSError unless something listens where Ray looks for its cluster; ``ray.init`` would try for minutes."""
    from ray._private.services import canonicalize_bootstrap_address

    if "://" in os.environ.get("RAY_ADDRESS", ""):  # Ray Client's, which answers at once
        return
    if address := canonicalize_bootstrap_address("auto"):
        host, port = address.rsplit(":", 1)
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
