"""What a wheel and an editable install hold, and that the wheel needs no repository beside it."""

import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import yaml
from serving import running_server, server_environment

ROOT = Path(__file__).parents[2]
# folder in the repository -> package it is imported as
SOURCES = {
    "vllm_twotower": "vllm_twotower",
    "patches": "vllm_twotower/patches",
    "models": "vllm_twotower/models",
}
EMBEDDED = "models/tiny-twotower"


def modules_on_disk() -> set[str]:
    return {
        str(Path(package) / path.relative_to(ROOT / folder))
        for folder, package in SOURCES.items()
        for path in (ROOT / folder).rglob("*.py")
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    # From a copy: setuptools builds in the source tree, where leftovers would end up in later wheels.
    source = tmp_path_factory.mktemp("source")
    for folder in SOURCES:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.name in ("pyproject.toml", "LICENSE", "README.md"):
            shutil.copy(path, source)
    dist = tmp_path_factory.mktemp("dist")
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    result = subprocess.run([sys.executable, "-c", build, str(dist)], cwd=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    [path] = dist.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """An environment with the wheel; others' packages come from this one, whose `.pth` files do not run there."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin/python"
    purelib = subprocess.check_output(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    ).strip()
    Path(purelib, "others.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps"]
    # pip would otherwise take the editable install beside others' packages for an older version, and remove it.
    subprocess.run([*pip, "--ignore-installed", str(wheel)], check=True)
    return folder


def outside() -> dict[str, str]:
    """The environment of a server's tests, without what would lead Python to the repository."""
    return {name: value for name, value in server_environment().items() if name != "PYTHONPATH"}


def vllm_twotower(installed: Path, *arguments: str, cwd: Path) -> str:
    """What the installed command prints."""
    command = [str(installed / "bin/vllm-twotower"), *arguments]
    done = subprocess.run(command, cwd=cwd, env=outside(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def import_paths(names: list[str], **kwargs) -> list[Path]:
    code = "import importlib, sys; [print(importlib.import_module(n).__file__) for n in sys.argv[1:]]"
    return [Path(p) for p in subprocess.check_output([sys.executable, "-c", code, *names], text=True, **kwargs).split()]


def test_wheel_holds_every_module(wheel):
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    assert packed == modules_on_disk(), "is a sub-package missing from [tool.setuptools] packages?"


def test_wheel_holds_the_embedded_model(wheel):
    archive = zipfile.ZipFile(wheel)
    package = f"{SOURCES['models']}/"
    packed = {name for name in archive.namelist() if name.startswith(package) and not name.endswith(".py")}
    on_disk = {f"vllm_twotower/{EMBEDDED}/{path.name}": path for path in (ROOT / EMBEDDED).iterdir()}
    assert packed == on_disk.keys()
    assert all(archive.read(name) == path.read_bytes() for name, path in on_disk.items())


def test_wheel_holds_the_page_of_watch(wheel):
    assert "vllm_twotower/watch/page.html" in zipfile.ZipFile(wheel).namelist()


def test_the_page_of_the_package_is_not_empty(wheel):
    archive = zipfile.ZipFile(wheel)
    [metadata] = [name for name in archive.namelist() if name.endswith("/METADATA")]
    page = email.message_from_bytes(archive.read(metadata))
    assert page["Description-Content-Type"] == "text/markdown"
    assert page.get_payload(decode=True).decode() == (ROOT / "README.md").read_text()
    assert {link.partition(", ")[0] for link in page.get_all("Project-URL")} == {"Paper", "vLLM"}
    assert page.get_all("Classifier")


def test_every_folder_is_a_package():
    folders = {str(Path(module).parent) for module in modules_on_disk()}
    assert {f for f in folders if f"{f}/__init__.py" not in modules_on_disk()} == set()


def test_wheel_declares_the_plugin_and_the_command(wheel):
    archive = zipfile.ZipFile(wheel)
    [entry_points] = [name for name in archive.namelist() if name.endswith("/entry_points.txt")]
    text = archive.read(entry_points).decode()
    assert "[vllm.general_plugins]\ntwotower = vllm_twotower:register\n" in text
    assert "vllm-twotower = vllm_twotower.cli:main\n" in text


def test_wheel_imports(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    [top, patches] = import_paths(["vllm_twotower", "vllm_twotower.patches"], cwd=tmp_path, env=env)
    assert top == tmp_path / "vllm_twotower/__init__.py"
    assert patches == tmp_path / "vllm_twotower/patches/__init__.py"


def test_installed_wheel_is_what_runs(installed, tmp_path):
    """Its modules and its entry points: those of the editable install have the same names."""
    code = (
        "import importlib.metadata as m, vllm_twotower, vllm_twotower.patches as patches;"
        "[plugin] = m.entry_points(group='vllm.general_plugins', name='twotower');"
        "print(vllm_twotower.__file__, patches.__file__, plugin.dist.locate_file(''), sep='\\n')"
    )
    python = str(installed / "bin/python")
    places = subprocess.check_output([python, "-c", code], cwd=tmp_path, env=outside(), text=True).splitlines()
    assert [place for place in places if not Path(place).is_relative_to(installed)] == []


def test_model_path_is_a_folder_of_the_installation(installed, tmp_path):
    path = Path(vllm_twotower(installed, "model-path", cwd=tmp_path).removesuffix("\n"))
    assert path.is_relative_to(installed)
    assert (path / "model.safetensors").read_bytes() == (ROOT / EMBEDDED / "model.safetensors").read_bytes()


def test_demo_runs_in_an_empty_folder(installed, tmp_path):
    printed = vllm_twotower(installed, "demo", cwd=tmp_path)
    assert "The answer is" in printed
    assert printed.startswith("The engine starts; its log is in ")
    assert "texts are exactly those of ar" in printed
    assert printed.splitlines()[-1].startswith("This run has shown: mask diffusion answers ")
    foreign = [line for line in printed.splitlines() if re.match(r"\(|\[|WARN|INFO|Loading|.*(WARNING|INFO) ", line)]
    assert foreign == []
    assert list(tmp_path.iterdir()) == []


def test_watch_runs_in_an_empty_folder(installed, tmp_path):
    printed = vllm_twotower(installed, "watch", "--html", "out.html", cwd=tmp_path)
    assert "The answer is 62." in printed
    assert [path.name for path in tmp_path.iterdir()] == ["out.html"]


def test_the_embedded_model_is_served_from_an_empty_folder(installed, tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()

    def start(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen:
        vllm = [str(installed / "bin/python"), "-m", "vllm.entrypoints.cli.main"]
        with log.open("wb") as output:
            return subprocess.Popen(
                [*vllm, *command[1:]],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={name: value for name, value in environment.items() if name != "PYTHONPATH"},
                start_new_session=True,
            )

    model = vllm_twotower(installed, "model-path", cwd=folder).removesuffix("\n")
    with running_server(model, tmp_path / "log", "--max-model-len", "1024", starter=start) as server:
        question = {"prompt": "Question: What is 7 + 5?\nAnswer:", "max_tokens": 64, "temperature": 0}
        assert "The answer is 12." in server.post("/v1/completions", **question).json()["choices"][0]["text"]
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("cwd", [Path("/"), ROOT], ids=["elsewhere", "in the repository"])
@pytest.mark.parametrize("folder", ["models", "patches"])
def test_installation_imports_in_a_new_process(folder, cwd):
    """vLLM starts its engine in new processes; the editable install must reach them, wherever they run."""
    [path] = import_paths([f"vllm_twotower.{folder}"], cwd=cwd)
    assert path in (ROOT / folder / "__init__.py", path.parents[1] / folder / "__init__.py")


def test_lock_is_pinned_and_cpu_only():
    lines = (ROOT / "requirements/cpu.lock").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert [pin for pin in pins if "==" not in pin.split(";")[0] or "://" in pin] == []
    unwanted = ("torchvision", "torchaudio", "torchcodec", "triton", "nvidia-", "cuda-")
    assert [pin for pin in pins if pin.startswith(unwanted)] == []
    assert "torch==2.13.0+cpu" in pins


def test_tools_for_contributors_are_those_of_the_lock_and_the_makefile():
    lock = (ROOT / "requirements/cpu.lock").read_text().splitlines()
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert {hook["id"] for hook in hooks} == {"ruff-check", "ruff-format"}
    assert all(set(hook["additional_dependencies"]) <= set(lock) for hook in hooks)
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    steps = [step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]]
    targets = {step.split()[1] for step in steps if step.startswith("make ")}
    assert {"setup", "lint", "test"} <= targets
    assert targets <= set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


FAKE_PYTHON = """#!/bin/sh
# Stands for the Python of a set-up: makes environments of itself and notes what pip is asked for.
case "$2 $3" in
    "venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "pip install") echo "$*" >> "$CALLS"
        case "$*" in *"$REFUSED"*) echo "$WORDS" >&2; exit 1 ;; esac ;;
esac
"""
CPU_BUILD, PLAIN_BUILD = "torch==2.13.0+cpu", "torch==2.13.0"
NOT_FOUND = f"ERROR: No matching distribution found for {CPU_BUILD}"


@pytest.mark.parametrize(
    ("words", "index", "takes_plain"),
    [
        pytest.param(None, "", False, id="found"),
        pytest.param(NOT_FOUND, "", True, id="not found"),
        pytest.param(NOT_FOUND, "TORCH_INDEX=/wheels", None, id="not found where it was said to be"),
        pytest.param("ERROR: No space left on device", "", None, id="found but not installed"),
    ],
)
def test_setup_takes_the_plain_torch_where_pip_finds_no_cpu_build(words, index, takes_plain, tmp_path):
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    variables = [f"PYTHON={python}", f"VENV={tmp_path / 'venv'}", index]
    outer = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "TORCH_INDEX")}
    env = outer | {"CALLS": str(calls), "REFUSED": CPU_BUILD if words else "nothing", "WORDS": words or ""}
    result = subprocess.run(
        ["make", "setup", *filter(None, variables)], cwd=ROOT, env=env, capture_output=True, text=True
    )
    asked = calls.read_text().splitlines()
    assert asked[0].split()[-1] == CPU_BUILD
    if takes_plain is None:
        assert result.returncode
        assert words in result.stdout
        assert len(asked) == 1
        return
    assert result.returncode == 0, result.stderr
    assert "ERROR" not in result.stdout + result.stderr
    assert ("make clean setup TORCH_INDEX=" in result.stdout) is takes_plain
    assert [call.split()[-1] for call in asked if "--constraint" in call] == [PLAIN_BUILD] * takes_plain
    # The lock's line would put the CPU build in the place of the plain one.
    lock = (tmp_path / "venv/lock.txt").read_text()
    assert "numpy==" in lock
    assert "torch==" not in lock
