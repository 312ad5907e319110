"""What a server runs stays small enough to be read: lines of code without blank ones, comments and docstrings."""

import ast
import io
import tokenize
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "vllm_twotower"
ENTRIES = (
    "vllm_twotower",
    "vllm_twotower.platform",
    "vllm_twotower.engine_config",
    "vllm_twotower.engine.scheduler",
    "vllm_twotower.engine.worker",
    "vllm_twotower.engine.metrics",
    "vllm_twotower.model.two_tower",
)
"""What vLLM loads by name: entry points, and the classes that the configuration names."""
APART = ("vllm_twotower.patches", "vllm_twotower.kernels", "vllm_twotower.experiments")
"""Of the last a server imports the ablations alone, in developer mode."""
ROOT = Path(find_spec(PACKAGE).origin).parent
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def file_of(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split(".")[1:])
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.exists()), None)


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def imports(module: str) -> Iterator[str]:
    """The modules of the package that one imports, wherever in it, and those that they lie in."""
    package = module if file_of(module).name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(parsed(file_of(module))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
            start = ".".join(filter(None, (base, node.module))) if node.level else node.module
            names = [start, *(f"{start}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == PACKAGE:
                yield from (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def served_modules() -> set[str]:
    found, open_ones = set(), list(ENTRIES)
    while open_ones:
        module = open_ones.pop()
        if module not in found and file_of(module) is not None and not module.startswith(APART):
            found.add(module)
            open_ones.extend(imports(module))
    return found


def code_lines(file: Path) -> int:
    docstrings = {
        line
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, node.end_lineno + 1)
    }
    tokens = tokenize.generate_tokens(io.StringIO(file.read_text()).readline)
    lines = {line for token in tokens if token.type not in NO_CODE for line in range(token.start[0], token.end[0] + 1)}
    return len(lines - docstrings)


def test_what_a_server_imports_is_small() -> None:
    modules = served_modules()
    assert {"vllm_twotower.engine.fill", "vllm_twotower.sampling.strategies"} <= modules
    assert not any(module.startswith(("vllm_twotower.training", "vllm_twotower.reference")) for module in modules)
    sizes = {module: code_lines(file_of(module)) for module in modules}
    assert sum(sizes.values()) < 4900, sorted(sizes.items(), key=lambda item: -item[1])


def test_the_scheduler_is_short() -> None:
    assert len(file_of("vllm_twotower.engine.scheduler").read_text().splitlines()) < 150


def test_functions_of_the_engine_are_short() -> None:
    files = [*(ROOT / "engine").glob("*.py"), ROOT / "engine_config.py", ROOT / "options.py"]
    lengths = {
        f"{file.name}:{node.name}": node.end_lineno - node.lineno + 1
        for file in files
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: length for name, length in lengths.items() if length > 60} == {}
