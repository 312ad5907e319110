"""The patch records: complete, pointing at code that exists, and checked against exactly the vLLM that is installed."""

import ast
import dataclasses
import functools
import hashlib
import importlib.util
import inspect
import pkgutil
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from packaging.version import Version
from vllm.version import __version__ as VLLM_VERSION

import vllm_twotower.patches as patches
from vllm_twotower.patches import _cpu_kernel, model_runner_choice, registry
from vllm_twotower.patches.registry import TWO_TOWER_ARCHITECTURE, Patch, all_patches, locate

VLLM_RELEASE = Version(VLLM_VERSION).base_version
PATCHES = all_patches()
each_patch = pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
without_triton = pytest.mark.skipif(not registry.runs_on_cpu_without_triton(), reason="for a CPU without Triton")

TWO_TOWER = SimpleNamespace(architectures=[TWO_TOWER_ARCHITECTURE])
OTHER_MODEL = SimpleNamespace(architectures=["LlamaForCausalLM"])


def source_digest(sources: tuple[str, ...]) -> str:
    """SHA-256 over the source texts of "module:qualified.name" definitions."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(definition_source(source).encode() + b"\0")
    return digest.hexdigest()


def definition_source(source: str) -> str:
    """The text of one function or class, decorators included.

    Read from the file, because the live object may be a compiled Triton kernel or already replaced.
    """
    text, _ = parsed_module(source.partition(":")[0])
    node = definition(source)
    first_line = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return "\n".join(text.splitlines()[first_line - 1 : node.end_lineno])


def definition(source: str) -> ast.AST:
    module_name, _, path = source.partition(":")
    _, node = parsed_module(module_name)
    for name in path.split("."):
        node = next(child for child in ast.iter_child_nodes(node) if getattr(child, "name", None) == name)
    return node


@functools.cache
def parsed_module(module_name: str) -> tuple[str, ast.AST]:
    text = Path(importlib.util.find_spec(module_name).origin).read_text(encoding="utf-8")
    return text, ast.parse(text)


@each_patch
def test_target_exists(patch: Patch):
    locate(patch.target)


@each_patch
def test_upstream_source_is_the_one_the_patch_was_checked_against(patch: Patch):
    recorded = patch.source_sha256.get(VLLM_RELEASE)
    if recorded is None and not patch.applies_when():
        pytest.skip(f"does not apply here and has not been checked against vLLM {VLLM_RELEASE}")
    found = source_digest(patch.sources)
    assert recorded == found, (
        f"vLLM {VLLM_RELEASE}: compare {', '.join(patch.sources)} with the patch '{patch.name}', "
        f"adapt it, then record source_sha256 {found}"
    )


@each_patch
def test_record_is_complete(patch: Patch):
    for field in dataclasses.fields(patch):
        assert getattr(patch, field.name), field.name
    assert patch.applies_when.__doc__, "applies_when says in words when the patch applies"
    assert all(Version(version).base_version == version for version in patch.source_sha256)


def test_names_are_unique():
    assert len({patch.name for patch in PATCHES}) == len(PATCHES)


def test_every_module_registers_a_patch():
    """Only the registry itself and modules with a leading underscore may hold none."""
    modules = {module.name for module in pkgutil.iter_modules(patches.__path__) if not module.name.startswith("_")}
    assert modules - {"registry"} == {*registry.START_MODULES, *registry.WORKER_MODULES}
    for name in modules - {"registry"}:
        assert registry.load_patches(name), name


def test_changed_upstream_source_is_noticed(monkeypatch):
    """The digest depends on the body, not only on the name."""
    source = PATCHES[0].sources
    before = source_digest(source)
    module_name = source[0].partition(":")[0]
    text = parsed_module(module_name)[0].replace("Model Runner V2 requires Triton", "something else")
    monkeypatch.setitem(globals(), "parsed_module", lambda _: (text, ast.parse(text)))
    assert source_digest(source) != before


def test_renamed_target_gives_one_clear_error():
    patch = dataclasses.replace(PATCHES[0], target="vllm.config.vllm:VllmConfig.renamed", applies_when=lambda: True)
    with pytest.raises(RuntimeError) as caught:
        registry.install_if_needed(patch)
    for part in (patch.name, patch.target, VLLM_VERSION):
        assert part in str(caught.value)


def test_no_cpu_kernel_where_triton_works(monkeypatch):
    monkeypatch.setattr("vllm.triton_utils.HAS_TRITON", True)
    applied = {patch.name for patch in PATCHES if patch.applies_when()}
    assert applied == {
        "sampling-params-validation",
        "structured-outputs-validation",
        "grammar-bitmask",
        "diffusion-metrics",
        "shared-memory-names",
        "beam-search-completion",
        "beam-search-chat",
        "open-requests-of-a-server",
        "open-requests-offline",
        "request-errors",
    }


@pytest.fixture
def uninstalled(monkeypatch):
    """Every target as it is before the patches, and as it was again after the test."""
    monkeypatch.setattr(registry, "_installed", set())
    for patch in PATCHES:
        holder, name = locate(patch.target)
        monkeypatch.setattr(holder, name, vars(holder)[name])
        current = vars(holder)[name]
        if isinstance(current, property):
            monkeypatch.setattr(holder, name, property(inspect.unwrap(current.fget)))
        else:
            monkeypatch.setattr(holder, name, inspect.unwrap(current))


@pytest.mark.usefixtures("uninstalled")
def test_installing_twice_changes_nothing_more():
    patches.install_start_patches()
    patches.install_worker_patches()
    installed = [vars(locate(patch.target)[0])[locate(patch.target)[1]] for patch in PATCHES]
    patches.install_start_patches()
    patches.install_worker_patches()
    again = [vars(locate(patch.target)[0])[locate(patch.target)[1]] for patch in PATCHES]
    assert all(first is second for first, second in zip(installed, again, strict=True))


@without_triton
@pytest.mark.usefixtures("uninstalled")
def test_only_two_tower_gets_model_runner_v2(monkeypatch):
    import vllm.config.vllm as config_module

    VllmConfig = config_module.VllmConfig
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    monkeypatch.setattr(VllmConfig, "_get_v2_model_runner_unsupported_features", lambda self: [])
    patches.install_start_patches()

    def config_for(model_config):
        config = object.__new__(VllmConfig)
        config.model_config = model_config
        config.attention_config = SimpleNamespace(hisparse_config=None)
        return config

    two_tower, other = config_for(TWO_TOWER), config_for(OTHER_MODEL)
    assert two_tower.use_v2_model_runner
    two_tower._validate_v2_model_runner()
    for config in (other, config_for(None)):
        assert not config.use_v2_model_runner
        with pytest.raises(ValueError, match="Triton"):
            config._validate_v2_model_runner()
    assert not config_module.HAS_TRITON
    assert inspect.unwrap(VllmConfig.use_v2_model_runner.fget).__module__ == model_runner_choice.CHOICE.split(":")[0]


@pytest.mark.usefixtures("uninstalled")
def test_two_tower_requests_are_checked_by_our_rules(monkeypatch):
    import sys

    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams

    checked = []
    ours = SimpleNamespace(validate_sampling_params=lambda params, model_config: checked.append(model_config))
    monkeypatch.setitem(sys.modules, "vllm_twotower.config", ours)
    patches.install_start_patches()

    params = SamplingParams(temperature=0.0, seed=1)
    TWO_TOWER.is_diffusion = OTHER_MODEL.is_diffusion = True
    params._validate_diffusion(TWO_TOWER)
    assert checked == [TWO_TOWER]
    with pytest.raises(VLLMValidationError, match="temperature"):
        params._validate_diffusion(OTHER_MODEL)
    assert checked == [TWO_TOWER]


@without_triton
@pytest.mark.usefixtures("uninstalled")
def test_cpu_kernels_take_the_parameters_of_the_triton_kernels():
    """Same parameters in the same order, except for constants that only size the launch."""
    patches.install_worker_patches()
    kernels = [patch.target for patch in PATCHES if patch.target.endswith("_kernel")]
    assert kernels
    for target in kernels:
        holder, name = locate(target)
        kernel = getattr(holder, name)
        assert isinstance(kernel, _cpu_kernel.CpuKernel)
        ours = [name for name in inspect.signature(kernel.function).parameters if name != "_launch_options"]
        upstream = [argument.arg.removesuffix("_ptr") for argument in definition(target).args.args]
        assert ours == [name for name in upstream if name.islower() or name in ours], target
