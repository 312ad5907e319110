"""Training on several processes: FSDP2 under torchrun or Ray Train, from the same command.

Every rank makes the whole batch of a step and takes its share of the sequences, so that any number of ranks sees the
same data; weights, gradients and optimizer states are sharded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from vllm_twotower.reference import TwoTowerModel


def rank() -> int:
    """This process's number, 0 if it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def process_group() -> Iterator[None]:
    """Joins the processes that torchrun started; does nothing in a single one, or where Ray Train has joined them."""
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def device() -> torch.device:
    """What this process trains on: its own GPU, if there are any."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cuda", torch.cuda.current_device())


def has_bf16() -> bool:
    """Whether this process's device multiplies bf16 matrices itself; a CPU that does not is far slower than in fp32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if not hasattr(torch.cpu, "get_capabilities"):  # an older PyTorch, which cannot say: then as configured
        return True
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last one: Arm


def barrier() -> None:
    """Waits for the other processes."""
    if dist.is_initialized():
        dist.barrier()


def shard(model: TwoTowerModel) -> None:
    """Shards every mixer's parameters over the ranks, and all others together."""
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (world_size(),))
    towers = {id(tower): tower for tower in (model.context_tower, model.denoiser_tower)}
    for tower in towers.values():
        for layer in tower.layers:
            fully_shard(layer.mixer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # The losses call these, not forward.
    for method in ("context_logits", "denoise_blocks"):
        register_fsdp_forward_method(model, method)


def full(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor as a whole one, on every rank."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def mean_over_ranks(value: float) -> float:
    """The mean of a number over the ranks."""
    if not dist.is_initialized():
        return value
    total = torch.tensor(value, device=device())
    dist.all_reduce(total)
    return total.item() / world_size()


def run_on_ray(function: Callable[[], None], num_workers: int) -> None:
    """Runs a function in ``num_workers`` processes of Ray Train, on the cluster at RAY_ADDRESS or one for this run.

    Raises RuntimeError naming what to install if Ray Train is not there, and ray.train.TrainingFailedError if a worker
    fails.
    """
    try:
        import ray
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
    except ImportError as error:
        raise RuntimeError("--ray needs Ray Train: pip install 'vllm-twotower[train,ray]'") from error
    folder = os.getcwd()

    def worker(_: dict) -> None:
        os.chdir(folder)  # Ray starts workers elsewhere; the configuration's paths are relative to here
        function()

    # Not whichever cluster this machine last had, which may serve a model, or be gone.
    ray.init(os.environ.get("RAY_ADDRESS", "local"))
    scaling = ScalingConfig(num_workers=num_workers, use_gpu=torch.cuda.is_available())
    TorchTrainer(worker, train_loop_config={}, scaling_config=scaling, run_config=RunConfig(name="vllm-twotower")).fit()
