"""Where the single rank of an engine on a CPU runs."""

from __future__ import annotations

import golden_data
import pytest
from vllm import EngineArgs
from vllm.platforms import current_platform

import vllm_twotower.platform

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="for CPUs")


@pytest.mark.parametrize(
    ("binding", "backend", "is_ours", "expected"),
    [
        ("nobind", None, True, "uni"),
        ("nobind", "mp", True, "mp"),
        ("nobind", None, False, "mp"),
        ("auto", None, True, "mp"),
        ("0", None, True, "mp"),
    ],
)
def test_a_rank_has_a_process_of_its_own_for_the_binding_of_threads(
    binding: str, backend: str | None, is_ours: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's choice for every other model."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", binding)
    monkeypatch.setattr(vllm_twotower.platform, "serves_two_tower", lambda model_config: is_ours)
    arguments = EngineArgs(model=str(golden_data.checkpoint("A")), distributed_executor_backend=backend)
    config = arguments.create_engine_config()
    assert config.parallel_config.distributed_executor_backend == expected
