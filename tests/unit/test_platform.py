"""Which processes an engine on a CPU has, and how they start."""

from __future__ import annotations

import os

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


@pytest.mark.parametrize(
    ("asked", "binding", "is_ours", "expected", "is_said"),
    [
        ("fork", "nobind", True, "fork", False),
        ("spawn", "nobind", True, "spawn", False),
        (None, "nobind", True, "spawn", False),
        ("fork", "nobind", False, "spawn", False),
        ("fork", "auto", True, "spawn", True),
        (None, "auto", True, "spawn", False),
    ],
)
def test_processes_are_forked_where_no_threads_are_bound(
    asked: str | None, binding: str, is_ours: bool, expected: str, is_said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM spawns them, whatever was asked for."""
    warnings: list[str] = []
    monkeypatch.setattr(vllm_twotower.platform.logger, "warning", lambda text, *values: warnings.append(text % values))
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", asked or "")  # always, so that it is put back
    if asked is None:
        monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", binding)
    monkeypatch.setattr(vllm_twotower.platform, "serves_two_tower", lambda model_config: is_ours)
    EngineArgs(model=str(golden_data.checkpoint("A"))).create_engine_config()
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == expected
    said = "=fork: processes are spawned, since VLLM_CPU_OMP_THREADS_BIND=auto binds their threads"
    assert warnings == [f"VLLM_WORKER_MULTIPROC_METHOD{said}"] * is_said
