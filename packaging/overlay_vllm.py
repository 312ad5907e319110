"""Puts the Python code of another release over the vLLM that is installed here, whose compiled CPU kernels stay.

So the tests can run with a release that has builds for GPUs only:

    python packaging/overlay_vllm.py 0.33.0
"""

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ALSO_NEEDED = ("orjson",)
"""What 0.33 imports and 0.32 does not."""
IS_INSTALLED = "import sys, vllm.version; sys.exit(vllm.version.__version__ != sys.argv[1])"


def main(release: str) -> None:
    """Replaces the package ``vllm`` of this environment; its name and version for pip stay."""
    if subprocess.run([sys.executable, "-c", IS_INSTALLED, release], capture_output=True).returncode == 0:
        return
    package = Path(importlib.util.find_spec("vllm").origin).parent
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory(dir=package.parent) as folder:
        download = [*pip, "download", "--no-deps", "--only-binary=:all:", "--dest", folder, f"vllm=={release}"]
        subprocess.run(download, check=True)
        [wheel] = Path(folder).glob("*.whl")
        new = Path(folder) / "new"
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.startswith("vllm/") and not name.endswith(".so")]
            archive.extractall(new, members)
        for kernels in package.glob("*.so"):
            shutil.copy2(kernels, new / "vllm")
        shutil.rmtree(package)
        shutil.move(new / "vllm", package)
    subprocess.run([*pip, "install", "--no-deps", *ALSO_NEEDED], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
