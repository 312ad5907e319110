"""What TwoTower engines on a CPU get where the user says nothing: processes, how they start, and a KV cache."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import golden_data
import pytest
from vllm import AsyncEngineArgs, EngineArgs
from vllm.config import VllmConfig
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.platforms import current_platform
from vllm.platforms.cpu import CpuPlatform
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.mem_constants import GiB_bytes

import vllm_twotower.engine_config
import vllm_twotower.platform

REPOSITORY = Path(__file__).parents[2]
TINY = "models/tiny-twotower"

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


@pytest.fixture
def free_memory(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine of 16 GB of which 12 are free; a test may change how much is."""
    node = SimpleNamespace(total_memory=16 * GiB_bytes, available_memory=12 * GiB_bytes)
    monkeypatch.setattr("vllm.utils.cpu_resource_utils.get_memory_node_info", lambda number: node)
    monkeypatch.setattr("vllm.utils.cpu_resource_utils.get_visible_memory_node", lambda: [0])
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    return node


@pytest.mark.parametrize(
    ("free", "options", "space", "is_ours", "expected"),
    [
        (12, {}, "", True, 4),
        (6, {}, "", True, 3),
        (12, {"tensor_parallel_size": 2}, "", True, 3),
        (12, {"kv_cache_memory_bytes": 6 * GiB_bytes}, "", True, 6),
        (12, {}, "2", True, 2),
        (12, {"gpu_memory_utilization": 0.5}, "", True, None),
        (12, {}, "", False, None),
    ],
)
def test_kv_cache_is_bounded_where_nobody_says_how_large_it_is(
    free: int,
    options: dict[str, Any],
    space: str,
    is_ours: bool,
    expected: float | None,
    free_memory: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM takes 92 % of the memory, or refuses. Sizes are in GiB, expected for a rank."""
    said: list[str] = []
    monkeypatch.setattr(vllm_twotower.platform.logger, "info", lambda text, *values: said.append(text % values))
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", space)
    monkeypatch.setattr(vllm_twotower.platform, "serves_two_tower", lambda model_config: is_ours)
    free_memory.available_memory = free * GiB_bytes
    config = EngineArgs(model=str(golden_data.checkpoint("A")), **options).create_engine_config()
    assert config.cache_config.kv_cache_memory_bytes == (expected and expected * GiB_bytes)
    is_chosen = is_ours and not space and set(options) <= {"tensor_parallel_size"}
    assert [text.partition(" ")[0] for text in said] == [f"kv_cache_memory_bytes={expected}.0G"] * is_chosen


def serve_commands() -> list[str]:
    """Every `vllm serve` of the README and docs/, with the variables before it; a checkpoint is the tiny model."""
    found = []
    for path in (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))):
        for block in re.findall(r"^```\w*\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE):
            lines = block.replace("\\\n", " ").splitlines()
            model = r"<[^>]*checkpoint>|\"\$\(vllm-twotower model-path\)\""
            found += [re.sub(model, TINY, line) for line in lines if "vllm serve " in line]
    assert len(found) > 5
    return found


def served_config(command: str, monkeypatch: pytest.MonkeyPatch) -> VllmConfig:
    """The configuration of an engine that the command line starts."""
    words = shlex.split(command, comments=True)
    start = words.index("vllm")
    for name, value in (word.split("=", 1) for word in words[:start]):
        monkeypatch.setenv(name, value)
    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers())
    args = parser.parse_args(words[start + 1 :])
    args.model = args.model_tag
    return AsyncEngineArgs.from_cli_args(args).create_engine_config()


@pytest.mark.usefixtures("free_memory")
@pytest.mark.parametrize("command", serve_commands())
def test_every_documented_server_fits_into_16_gb(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(vllm_twotower.engine_config, "_check_ranks", lambda config: None)  # there are none
    config = served_config(command, monkeypatch)
    assert config.cache_config.kv_cache_memory_bytes
    assert config.cache_config.kv_cache_memory_bytes * config.parallel_config.world_size <= 6 * GiB_bytes


@pytest.mark.usefixtures("free_memory")
def test_the_documented_engine_fits_into_16_gb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    [engine] = re.findall(r"^llm = LLM\((.*)\)$", (REPOSITORY / "README.md").read_text(), re.MULTILINE)
    arguments = eval(f"EngineArgs({engine})")
    assert arguments.create_engine_config().cache_config.kv_cache_memory_bytes <= 6 * GiB_bytes


@pytest.mark.parametrize("options", [{"distributed_executor_backend": "ray"}, {"data_parallel_backend": "ray"}])
def test_any_other_model_over_ray_is_refused_in_the_words_of_vllm(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose CPU platform names no device of Ray's; ours does, since it is chosen before a model is."""
    monkeypatch.setattr(vllm_twotower.engine_config, "_check_ranks", lambda config: None)
    monkeypatch.setattr(vllm_twotower.platform, "serves_two_tower", lambda model_config: False)
    assert (CpuPlatform.ray_device_key, current_platform.ray_device_key) == ("", "GPU")
    with pytest.raises(ValueError, match="current platform cpu does not support ray"):
        EngineArgs(model=str(golden_data.checkpoint("A")), **options).create_engine_config()


@pytest.mark.parametrize("first", ["vllm.config", "vllm.distributed", "vllm.platforms", "vllm.v1.engine.async_llm"])
def test_the_platform_is_found_whatever_is_imported_first(first: str) -> None:
    """It may be asked for while vLLM's own modules are being imported."""
    script = f"import {first}; from vllm.platforms import current_platform; print(type(current_platform).__name__)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout.split()[-1] == "TwoTowerCpuPlatform"
    assert "Failed to load plugin" not in result.stdout + result.stderr
