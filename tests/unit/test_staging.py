"""Arrays that travel to the device together keep their values, however many there are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_twotower.engine.staging import Staging

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]


@pytest.mark.parametrize("device", DEVICES)
def test_values_arrive_and_stay(device: str) -> None:
    """Also where the arrays outgrow the memory, between two copies and after."""
    staging = Staging(torch.device(device), capacity=10)
    for _ in range(3):
        staging.begin()
        arrays = [np.arange(n).astype(dtype) for n in (3, 0, 4, 5, 40) for dtype in (np.int64, np.int32, bool)]
        tensors = []
        for i, array in enumerate(arrays):
            tensors.append(staging.put(array))
            if i % 4 == 3:
                staging.send()
        staging.send()
        for array, tensor in zip(arrays, tensors, strict=True):
            assert tensor.dtype == torch.int64
            assert tensor.tolist() == array.astype(int).tolist()


def test_memory_is_used_again() -> None:
    staging = Staging(torch.device("cpu"), capacity=10)
    first = staging.put(np.arange(8))
    staging.begin()
    assert staging.put(np.ones(8)).data_ptr() == first.data_ptr()
