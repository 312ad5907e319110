"""`benchmarks/gpu.py` without a GPU: stages that end well, crash or hang, what is kept of them, and the arithmetic."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu  # noqa: E402
from pass_times import PASSES, Passes, Steps  # noqa: E402

FAKE = """
import json, pathlib, subprocess, sys, time
name, file = sys.argv[1:]
runs = pathlib.Path(__file__).with_name(f"{name}.runs")
runs.write_text(runs.read_text() + "1" if runs.exists() else "1")
rows = [{"what": "scan", "figure": 12.5, "unit": "us", "other": "torch", "other_figure": 50.0}]
if name == "card":
    rows = [{"what": "card", "figure": "NVIDIA H9", "unit": "", "other": "", "other_figure": None}]
pathlib.Path(file).write_text(json.dumps(rows))
if name == "goldens":
    sys.exit("out of memory")
if name == "options":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    pathlib.Path(__file__).with_name("child").write_text(str(child.pid))
    time.sleep(60)
"""
STAGES = [gpu.Stage(name, 3, name) for name in ("card", "kernels", "goldens", "options")]


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "fake.py"
    path.write_text(FAKE)
    monkeypatch.setattr(gpu, "SCRIPT", path)
    return path


def has_ended(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().split()[2] == "Z"


def test_a_stage_that_crashes_or_hangs_does_not_end_the_others(script: Path, tmp_path: Path) -> None:
    file = tmp_path / "runs" / "gpu.json"
    results = gpu.run_stages(STAGES, file)
    assert json.loads(file.read_text()) == results
    assert {name: result["status"] for name, result in results.items()} == {
        "card": gpu.DONE,
        "kernels": gpu.DONE,
        "goldens": "failed with exit status 1",
        "options": "stopped at its limit of 3 s",
    }
    assert "out of memory" in results["goldens"]["last_words"]
    assert all(result["rows"] for result in results.values()), "what came before the end is kept"
    child = int(script.with_name("child").read_text())
    deadline = time.monotonic() + 10
    while not has_ended(child):
        assert time.monotonic() < deadline, "what a stage has started ends with it"
        time.sleep(0.05)

    lines = list(gpu.table(results))
    assert lines[0] == f"NVIDIA H9, {results['card']['date']}"
    assert "| kernels | scan | 12.5 us | torch | 50 us | 0.25 |" in lines
    assert "| goldens | **failed with exit status 1** | | | | |" in lines
    assert "| fp8 | not run | | | | |" in lines
    assert {line.count("|") for line in lines[2:]} == {7}


def test_stages_that_ended_well_are_not_run_again(script: Path, tmp_path: Path) -> None:
    file, stages = tmp_path / "gpu.json", STAGES[1:3]
    gpu.run_stages(stages, file)
    gpu.run_stages(stages, file)
    assert [len(script.with_name(f"{stage.name}.runs").read_text()) for stage in stages] == [1, 2]
    gpu.run_stages(stages, file, again=True)
    assert [len(script.with_name(f"{stage.name}.runs").read_text()) for stage in stages] == [2, 3]


def test_without_cuda_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu, "name_of_card", lambda: None)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit) as raised:
        gpu.main()
    assert raised.value.code == 2
    printed = capsys.readouterr()
    assert printed.err == "benchmarks/gpu.py needs an NVIDIA GPU: PyTorch finds no CUDA device here.\n"
    assert not printed.out


def test_passes_are_what_longer_steps_take_longer() -> None:
    a, c, d, around = 2.0, 3.0, 5.0, 1.0
    first, further = around + c + d, around + d
    in_block = [False] * (PASSES - 1)
    diffusion = Steps(
        [further] * 3 + ([first] + [further] * (PASSES - 1)) * 2, [False, False, True] + [*in_block, True] * 2
    )
    found = Passes.of(
        ar=Steps([around + a] * 5, [True] * 5),
        long_ar=Steps([around + PASSES * a] * 5, [True] * 5),
        diffusion=diffusion,
        long_diffusion=Steps([around + c + PASSES * d] * 3, [True] * 3),
    )
    assert found == Passes(A=a, C=c, D=d, around_A=around, around_D=around)
