"""The records of patches and overrides: complete, pointing at code that exists, checked against the vLLM installed."""

import ast
import asyncio
import dataclasses
import functools
import hashlib
import importlib.util
import inspect
import pkgutil
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

import numpy as np
from packaging.version import Version
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.version import __version__ as VLLM_VERSION

import vllm_twotower
import vllm_twotower.patches as patches
from vllm_twotower.architecture import ARCHITECTURE
from vllm_twotower.model.step_logits import StepLogits
from vllm_twotower.patches import OVERRIDES, PATCHES, Override, Patch, grammar_bitmask, registry
from vllm_twotower.patches.cpu_runner import choice
from vllm_twotower.patches.cpu_runner.kernel import CpuKernel
from vllm_twotower.patches.registry import locate

VLLM_RELEASE = Version(VLLM_VERSION).base_version
each_patch = pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
each_override = pytest.mark.parametrize("override", OVERRIDES, ids=lambda override: override.name)
each_record = pytest.mark.parametrize("record", PATCHES + OVERRIDES, ids=lambda record: record.name)
without_triton = pytest.mark.skipif(not registry.runs_on_cpu_without_triton(), reason="for a CPU without Triton")

TWO_TOWER = SimpleNamespace(architectures=[ARCHITECTURE])
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


@each_override
def test_override_is_where_the_record_says(override: Override):
    locate_definition(override.where)
    for member in override.members:
        assert is_member(member), member


def locate_definition(target: str) -> object:
    """What "module" or "module:qualified.name" names."""
    module_name, _, path = target.partition(":")
    return functools.reduce(getattr, filter(None, path.split(".")), importlib.import_module(module_name))


def is_member(member: str) -> bool:
    """Whether vLLM has the function, or the class the method, field or attribute of its instances."""
    holder, _, name = member.replace(":", ".:.").rpartition(".")
    holder = locate_definition(holder.removesuffix(".:").replace(".:.", ":"))
    if not isinstance(holder, type):
        return hasattr(holder, name)
    return any(name in vars(base) or name in annotations(base) | set_attributes(base) for base in vllm_classes(holder))


def vllm_classes(cls: type) -> list[type]:
    return [base for base in cls.__mro__ if base.__module__.partition(".")[0] == "vllm"]


def annotations(cls: type) -> set[str]:
    return set(vars(cls).get("__annotations__", ()))


@functools.cache
def set_attributes(cls: type) -> frozenset[str]:
    """The attributes that a class's methods set on self."""
    targets = (
        node
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(cls))))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name)
    )
    return frozenset(node.attr for node in targets if node.value.id == "self")


@each_record
def test_upstream_source_is_the_one_the_record_was_checked_against(record: Patch | Override):
    recorded = record.source_sha256.get(VLLM_RELEASE)
    if recorded is None and not record.applies_when():
        pytest.skip(f"does not apply here and has not been checked against vLLM {VLLM_RELEASE}")
    found = source_digest(record.sources)
    assert recorded == found, (
        f"vLLM {VLLM_RELEASE}: compare {', '.join(record.sources)} with '{record.name}', adapt it, then record "
        f"source_sha256 {found}"
    )


@each_record
def test_record_is_complete(record: Patch | Override):
    for field in dataclasses.fields(record):
        assert getattr(record, field.name) or field.name == "wraps", field.name
    assert record.applies_when.__doc__, "applies_when says in words when the record applies"
    assert all(Version(version).base_version == version for version in record.source_sha256)


def test_names_are_unique():
    assert len({record.name for record in PATCHES + OVERRIDES}) == len(PATCHES + OVERRIDES)


def test_every_module_has_what_a_patch_installs():
    """Only the table, the records and what kernels share have nothing of the kind."""
    prefix = f"{patches.__name__}."
    found = pkgutil.walk_packages(patches.__path__, prefix)
    modules = {module.name.removeprefix(prefix) for module in found if not module.ispkg}
    modules -= {"table", "registry", "overrides", "cpu_runner.kernel"}
    assert modules == {patch.function.partition(":")[0] for patch in PATCHES}


@each_patch
def test_function_exists(patch: Patch):
    assert callable(locate_definition(f"{patches.__name__}.{patch.function}")) or not patch.wraps


RECORDED = {member for override in OVERRIDES for member in override.members}
# What looks private and is the public interface of Python's named tuples, or belongs to another library.
NOT_OF_VLLM = {
    "_convert_weight_to_int4pack_for_cpu",  # torch
    "_weight_int4pack_mm_for_cpu",
    "_weight_int8pack_mm",
    "_asdict",
    "_exit",
    "_replace",
    "_prctl_pr_set_pdeathsig",
    "_is_amx_tile_supported",
    "_is_avx512_bf16_supported",
}


def our_modules() -> Iterator[str]:
    for module in pkgutil.walk_packages(vllm_twotower.__path__, "vllm_twotower."):
        if not module.name.startswith(patches.__name__) and not module.name.endswith("__main__"):
            yield module.name


def our_subclasses() -> Iterator[type]:
    for name in our_modules():
        for cls in vars(importlib.import_module(name)).values():
            if isinstance(cls, type) and cls.__module__ == name and vllm_classes(cls):
                yield cls


def of_vllm(cls: type, name: str, is_set: bool) -> set[str]:
    """The classes' members of that name that a subclass overrides, or whose instances' attribute it sets anew."""
    return {
        f"{base.__module__}:{base.__qualname__}.{name}"
        for base in vllm_classes(cls)
        if name in vars(base) or (is_set and name in set_attributes(base))
    }


def overridden_members() -> dict[str, set[str]]:
    """Our members that override private ones, and attributes that are set anew: the members of vLLM's classes."""
    found = {}
    for cls in our_subclasses():
        ours = {name: False for name in vars(cls) if name.startswith("_") and not name.startswith("__")}
        ours.pop("_abc_impl", None)  # Python's own
        ours.pop("_is_protocol", None)
        ours |= dict.fromkeys(set_attributes(cls), True)
        for name, is_set in ours.items():
            if members := of_vllm(cls, name, is_set):
                found[f"{cls.__module__}:{cls.__qualname__}.{name}"] = members
    return found


def test_every_private_member_that_is_overridden_has_a_record():
    found = overridden_members()
    assert any(name.endswith("TwoTowerScheduler._free_request") for name in found)
    assert {name: members for name, members in found.items() if not members & RECORDED} == {}, (
        "these override members of vLLM's classes that are not its interface: add an Override to patches/overrides.py"
    )


def private_names() -> tuple[set[str], set[str]]:
    """The private names that our code defines, and those that it uses."""
    defined, used = set(), set()
    for module_name in our_modules():
        for node in ast.walk(parsed_module(module_name)[1]):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                defined.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                defined.add(node.id)
            elif isinstance(node, ast.Attribute):
                is_own = (
                    isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id == "self"
                )
                (defined if is_own else used).add(node.attr)
            elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm":
                used.update(alias.name for alias in node.names)
    return defined, {name for name in used if name.startswith("_") and not name.startswith("__")}


def test_every_private_name_of_vllm_that_is_used_has_a_record():
    defined, used = private_names()
    recorded = {member.replace(":", ".").rpartition(".")[2] for member in RECORDED}
    assert "_encode_layer_name" in used - defined
    assert used - defined - recorded - NOT_OF_VLLM == set(), (
        "nothing in this package defines these: add an Override to patches/overrides.py if they are vLLM's"
    )


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
        patch.install()
    for part in (patch.name, patch.target, VLLM_VERSION):
        assert part in str(caught.value)


def test_no_cpu_kernel_where_triton_works(monkeypatch):
    monkeypatch.setattr("vllm.triton_utils.HAS_TRITON", True)
    applied = {patch.name for patch in PATCHES if patch.applies_when()}
    assert applied == {
        "sampling-params-validation",
        "structured-outputs-validation",
        "grammar-bitmask",
        "pass-graphs",
        "diffusion-metrics",
        "open-requests-of-a-server",
        "open-requests-offline",
        "request-errors",
        "shared-memory-names-executor",
        "lost-options",
        *(patch.name for patch in patches.TRACE_PATCHES),
        *(["embedding-mask"] if registry.runs_on_cpu() else ()),
    }


@pytest.fixture
def uninstalled(monkeypatch):
    """Every target as it is before the patches, and as it was again after the test."""
    monkeypatch.setattr(patches, "_installed", set())
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
        if registry.configuration_asks_for_triton():
            with pytest.raises(ValueError, match="Triton"):
                config._validate_v2_model_runner()
    assert not config_module.HAS_TRITON
    assert inspect.unwrap(VllmConfig.use_v2_model_runner.fget).__module__ == config_module.__name__


@pytest.mark.usefixtures("uninstalled")
def test_two_tower_requests_are_checked_by_our_rules(monkeypatch):
    import sys

    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams

    checked = []
    ours = SimpleNamespace(validate_sampling_params=lambda params, model_config: checked.append(model_config))
    monkeypatch.setitem(sys.modules, "vllm_twotower.options", ours)
    patches.install_start_patches()

    params = SamplingParams(temperature=0.0, seed=1)
    TWO_TOWER.is_diffusion = OTHER_MODEL.is_diffusion = True
    params._validate_diffusion(TWO_TOWER)
    assert checked == [TWO_TOWER]
    with pytest.raises(VLLMValidationError, match="temperature"):
        params._validate_diffusion(OTHER_MODEL)
    assert checked == [TWO_TOWER]


each_model = pytest.mark.parametrize("model", [TWO_TOWER, OTHER_MODEL], ids=["ours", "other"])


def small_queue() -> MessageQueue:
    return MessageQueue(1, 1, max_chunk_bytes=1024, max_chunks=1)


def name_of(queue: MessageQueue) -> Path:
    return Path("/dev/shm") / queue.buffer.shared_memory.name


@each_model
@pytest.mark.usefixtures("uninstalled")
def test_only_a_two_tower_executors_queue_loses_its_name(model: SimpleNamespace):
    patches.install_start_patches()
    queue = small_queue()
    assert name_of(queue).exists()
    config = SimpleNamespace(model_config=model)
    MultiprocExecutor._post_init_executor(SimpleNamespace(vllm_config=config, rpc_broadcast_mq=queue))
    assert name_of(queue).exists() is (model is OTHER_MODEL)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.usefixtures("uninstalled")
def test_only_a_ranks_queue_loses_its_name(monkeypatch, ranks: int):
    """Its process serves no other model."""
    monkeypatch.setattr("vllm.distributed.model_parallel_is_initialized", lambda: True)
    monkeypatch.setattr("vllm.distributed.get_tp_group", lambda: SimpleNamespace(world_size=ranks))
    patches.install_start_patches()
    patches.install_worker_patches()
    queue = small_queue()
    reader = MessageQueue.create_from_handle(queue.export_handle(), 0)
    with ThreadPoolExecutor(1) as pool:
        ready = pool.submit(reader.wait_until_ready)
        assert name_of(queue).exists()
        queue.wait_until_ready()
        ready.result()
    assert name_of(queue).exists() is (ranks == 1)


@each_model
@pytest.mark.parametrize("xargs", [{"diffusion_mode": "ar"}, {"other": 1}, None])
@pytest.mark.usefixtures("uninstalled")
def test_only_two_tower_beam_searches_refuse_diffusion_options(model: SimpleNamespace, xargs: dict | None):
    from vllm.entrypoints.serve.engine.serving import BaseServing
    from vllm.exceptions import VLLMValidationError

    patches.install_start_patches()
    serving = SimpleNamespace(model_config=model, request_logger=None, _is_model_supported=lambda name: True)
    request = SimpleNamespace(model="served", use_beam_search=True, vllm_xargs=xargs)
    is_refused = model is TWO_TOWER and "diffusion_mode" in (xargs or ())
    with pytest.raises(VLLMValidationError, match="vllm_xargs") if is_refused else nullcontext():
        assert asyncio.run(BaseServing._check_model(serving, request)) is None


@each_model
@pytest.mark.parametrize("level", ["tokens", "none", None])
@pytest.mark.usefixtures("uninstalled")
def test_traces_are_refused_where_responses_have_no_room(model: SimpleNamespace, level: str | None):
    """Of an API whose requests bring sampling parameters."""
    from vllm.entrypoints.serve.engine.serving import BaseServing
    from vllm.exceptions import VLLMValidationError

    patches.install_start_patches()
    serving = SimpleNamespace(model_config=model, request_logger=None, _is_model_supported=lambda name: True)
    params = SimpleNamespace(extra_args={"diffusion_trace": level} if level else None)
    request = SimpleNamespace(model="served", sampling_params=params)
    is_refused = model is TWO_TOWER and level == "tokens"
    with pytest.raises(VLLMValidationError, match="diffusion_trace") if is_refused else nullcontext():
        assert asyncio.run(BaseServing._check_model(serving, request)) is None


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
        assert isinstance(kernel, CpuKernel)
        upstream = [argument.arg.removesuffix("_ptr") for argument in definition(target).args.args]
        parameters = inspect.signature(kernel.function).parameters.values()
        # One with a default may be for another release.
        ours = [par.name for par in parameters if par.name in upstream or par.default is par.empty]
        ours.remove("_launch_options")
        assert ours == [name for name in upstream if name.islower() or name in ours], target


HAS_TRITON = False


@pytest.mark.parametrize(("model", "starts"), [(TWO_TOWER, True), (OTHER_MODEL, False), (None, False)])
def test_only_two_towers_worker_needs_no_triton(model, starts):
    class Base:
        def __init__(self, vllm_config):
            self.model_config = vllm_config.model_config

    class Worker(Base):
        def __init__(self, vllm_config, *, is_driver_worker):
            if not HAS_TRITON:
                raise ValueError("needs Triton")
            super().__init__(vllm_config)

    Worker.__init__ = choice.of_worker(Worker.__init__)
    with nullcontext() if starts else pytest.raises(ValueError, match="Triton"):
        assert Worker(SimpleNamespace(model_config=model), is_driver_worker=True).model_config is model


@pytest.mark.parametrize("rows_per_request", [1, 4])
def test_the_bitmask_of_the_next_token_is_kept(rows_per_request):
    """Since vLLM 0.33 a request has a row for each position of its canvas."""
    logits = StepLogits(None, None, None, None, None, tile=1)
    bitmask = np.arange(3 * rows_per_request * 2, dtype=np.int32).reshape(-1, 2)
    grammar_bitmask.keeping_bitmask(None)(None, logits, None, ["a", "b", "c"], bitmask)
    ids, kept = logits.grammar
    assert ids == ["a", "b", "c"]
    assert kept.tolist() == [[2 * rows_per_request * i, 2 * rows_per_request * i + 1] for i in range(3)]
