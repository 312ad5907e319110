"""The record of what this package overrides in vLLM's classes without a patch, or uses although it is private.

Subclasses override public methods too; those are vLLM's interface. What is listed here may change with any release:
private members that a subclass overrides, attributes that are set anew on an object of vLLM, private names that are
read. ``tests/unit/test_patches.py`` fails when the vLLM code behind a record changes, and when something of the kind
has no record.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vllm_twotower.patches.registry import everywhere, runs_on_cpu

SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
MANAGER = "vllm.v1.core.kv_cache_manager:KVCacheManager"
DIFFUSION_SCHEDULER = "vllm.v1.core.sched.diffusion_scheduler:DiffusionScheduler"
MIXER = "vllm.model_executor.layers.mamba.mamba_mixer2:MambaMixer2"
BUILDER = "vllm.v1.attention.backends.mamba_attn:BaseMambaAttentionMetadataBuilder"
ATTENTION = "vllm.model_executor.layers.attention.attention"
COMMUNICATOR = "vllm.distributed.device_communicators.cpu_communicator"
RUNNER = "vllm.v1.worker.gpu"
WORKER = "vllm.v1.worker.cpu_worker:CPUWorker"

OUR_SCHEDULER = "vllm_twotower.engine.scheduler:TwoTowerScheduler"


@dataclass(frozen=True)
class Override:
    """Members of vLLM that are not its interface, and what this package does with them.

    Attributes:
        name: short unique name.
        members: "module:name" of functions, "module:Class.name" of methods and attributes.
        where: "module:qualified.name" of the code that overrides, sets or reads them.
        why: what for.
        applies_when: whether this process needs it; its docstring says when.
        sources: the upstream definitions ("module:qualified.name") whose behaviour that code relies on.
        source_sha256: vLLM release -> digest of the sources' text at which the code was checked; see test_patches.py.
    """

    name: str
    members: tuple[str, ...]
    where: str
    why: str
    sources: tuple[str, ...]
    source_sha256: Mapping[str, str]
    applies_when: Callable[[], bool] = everywhere


OVERRIDES = (
    Override(
        name="page-split",
        members=(f"{SCHEDULER}._mamba_block_aligned_split",),
        where=f"{OUR_SCHEDULER}._mamba_block_aligned_split",
        why="A prompt goes on with less than a page, where blocks leave no room for one: vLLM would let it wait.",
        sources=(f"{SCHEDULER}._mamba_block_aligned_split",),
        source_sha256={
            "0.32.0": "dfe5e921cbaed6d8c47e140e8e353ed8b95f40453a8319e3b11446bbe8c60043",
            "0.33.0": "2a2347a9d1d680340796a2794c178098af2428d1fdf95a7bd25c743de9db0873",
        },
    ),
    Override(
        name="freed-pages",
        members=(f"{SCHEDULER}._free_request_blocks",),
        where=f"{OUR_SCHEDULER}._free_request_blocks",
        why="Pages that the context tower has read can be found by later requests when they are given up.",
        sources=(f"{SCHEDULER}._free_request_blocks",),
        source_sha256=dict.fromkeys(
            ("0.32.0", "0.33.0"), "739ca909d808cf95391026c9bf5d63a77afffa67d293d18b09b163e9c3cabb7a"
        ),
    ),
    Override(
        name="freed-requests",
        members=(f"{SCHEDULER}._free_request",),
        where=f"{OUR_SCHEDULER}._free_request",
        why="A request's kept scores go with it.",
        sources=(f"{SCHEDULER}._free_request",),
        source_sha256={
            "0.32.0": "61b1637a303b7bb01bc57f4ca09e9422b1d6d7c987719a1aed63e6e08e353ea9",
            "0.33.0": "19d15f03a56816a2e2dd6d9ecb36c272cd408cd090488ae2b4b905e67ff2926b",
        },
    ),
    Override(
        name="scheduler-attributes",
        members=(
            f"{SCHEDULER}.max_num_scheduled_tokens",
            f"{SCHEDULER}.num_lookahead_tokens",
            f"{SCHEDULER}.spec_decode_metrics_level",
        ),
        where=OUR_SCHEDULER,
        why="Prompts beside blocks get a share of each step; pages are allocated for the canvas after them; metrics of "
        "requests are on without speculative decoding.",
        sources=(f"{SCHEDULER}.__init__", f"{SCHEDULER}.schedule", DIFFUSION_SCHEDULER),
        source_sha256={
            "0.32.0": "904c64038d8b54aaea2da5de5cb786563528a2d9ef9aead621c18ecc6b4af8b7",
            "0.33.0": "fafa7dee3b62fca1f6542c76f0664b19791abe6b654393cc116501608486da79",
        },
    ),
    Override(
        name="request-counts",
        members=("vllm.v1.request:Request.num_computed_tokens", "vllm.v1.request:Request.spec_decode_metrics"),
        where=f"{OUR_SCHEDULER}.update_from_output",
        why="What the last step of a prompt returns lies in pages beyond those it had scheduled; metrics are ours.",
        sources=("vllm.v1.request:Request.__init__", f"{SCHEDULER}.update_from_output", DIFFUSION_SCHEDULER),
        source_sha256={
            "0.32.0": "9eb2370b3b4dd8beb3d5f3c7da17bb38fef725f98a934e4e1a4d1ea1afc3a546",
            "0.33.0": "dbc034374b554dfdbc7161afa76d214661730c6921b786660e7ae32d8b61f7ff",
        },
    ),
    Override(
        name="found-pages",
        members=(
            f"{MANAGER}.allocate_slots",
            f"{MANAGER}.cache_blocks",
            "vllm.v1.request:Request.num_in_flight_tokens",
        ),
        where="vllm_twotower.engine.prefix_cache:FoundPages",
        why="Pages are found by later requests when the context tower has read them, not when they are scheduled.",
        sources=(f"{MANAGER}.allocate_slots", f"{MANAGER}.cache_blocks", f"{SCHEDULER}.update_from_output"),
        source_sha256={
            "0.32.0": "fcab805c8a6f296ff4fa1a2bbcdc2ab7b8f40045f306d843194d9b19614603f8",
            "0.33.0": "b300b391c0c3710d11cbaaab7440d3b42ed1803fc975ce283edee37f29477ce9",
        },
    ),
    Override(
        name="worker-reports",
        members=("vllm.v1.outputs:ModelRunnerOutput.num_nans_in_logits",),
        where="vllm_twotower.engine.running_requests:reports",
        why="What the worker reports of each row reaches the scheduler in it.",
        sources=(f"{RUNNER}.async_utils:AsyncOutput", f"{RUNNER}.sample.output:SamplerOutput"),
        source_sha256={
            "0.32.0": "a78175350244c24c222b714bc327da32bf2b7e822d59d96e6a6b201c093c39a4",
            "0.33.0": "ba933a7430d203cecb32bee3e0bae8879a22fd47949599fcedf481d9cfa72fa2",
        },
    ),
    Override(
        name="sampler",
        members=(
            f"{RUNNER}.sample.sampler:Sampler.compute_nans",
            f"{RUNNER}.sample.sampler:Sampler.logits_processors",
            f"{RUNNER}.sample.sampler:Sampler.penalties_state",
            f"{RUNNER}.sample.sampler:Sampler.req_states",
            f"{RUNNER}.sample.sampler:Sampler.sampling_states",
            f"{RUNNER}.input_batch:InputBatch.has_structured_output_reqs",
        ),
        where="vllm_twotower.engine.sampler:TwoTowerSampler",
        why="The runner reads these of whatever is its sampler; drafts are placeholders, which no grammar checks.",
        sources=(f"{RUNNER}.model_runner:GPUModelRunner.sample", f"{RUNNER}.model_runner:GPUModelRunner.sample_tokens"),
        source_sha256={
            "0.32.0": "a62a7437af4c21f7e9d0acb3dab48989d1fd6ab05a7d3fb908dfcf2260347611",
            "0.33.0": "993b6e85fb4887b20b5ce49a324427ff6d3b7d2b098d349393ffda8086cce518",
        },
    ),
    Override(
        name="request-metrics",
        members=(
            "vllm.v1.metrics.stats:RequestSpecDecodeMetrics.histogram",
            "vllm.v1.metrics.stats:RequestSpecDecodeMetrics.per_step_accepted",
        ),
        where="vllm_twotower.engine.metrics:RequestDenoisingMetrics",
        why="They count denoiser passes, and a block's tokens at its last one.",
        sources=("vllm.v1.metrics.stats:RequestSpecDecodeMetrics",),
        source_sha256=dict.fromkeys(
            ("0.32.0", "0.33.0"), "02fab6b16cd3b980c8280cc129f7bc51ca5247669715eb90eff3fe6a5dfea277"
        ),
    ),
    Override(
        name="metrics-counter",
        members=("vllm.v1.spec_decode.metrics:SpecDecodingProm._counter_cls",),
        where="vllm_twotower.engine.metrics:TwoTowerProm.__init__",
        why="Counters are of the kind that vLLM's are.",
        sources=("vllm.v1.spec_decode.metrics:SpecDecodingProm",),
        source_sha256=dict.fromkeys(
            ("0.32.0", "0.33.0"), "04c3ec70f4b7b75e9c32e5eee5fa124c3160eebffedd54aeccf12136c1331e02"
        ),
    ),
    Override(
        name="mamba-metadata",
        members=(
            f"{BUILDER}.num_spec_tokens",
            f"{BUILDER}.reorder_batch_threshold",
            f"{BUILDER}.state_indices_tensor_d",
            f"{BUILDER}.supports_update_block_table",
            f"{BUILDER}.use_spec_decode",
        ),
        where="vllm_twotower.model.context:CommittedMambaMetadataBuilder.__init__",
        why="The context tower reads committed tokens only; vLLM counts a canvas as drafts, each with a state slot.",
        sources=(
            f"{BUILDER}.__init__",
            "vllm.v1.attention.backends.mamba2_attn:Mamba2AttentionMetadataBuilder.__init__",
        ),
        source_sha256=dict.fromkeys(
            ("0.32.0", "0.33.0"), "a9a3aded890dc976fe8adadd8d44b7b9e7a86f3553699a1e3c0c6ae0671f7781"
        ),
    ),
    Override(
        name="mamba-states",
        members=(f"{MIXER}.num_spec",),
        where="vllm_twotower.model.context:ContextMambaMixer.__init__",
        why="The same, for the width of its convolution states.",
        sources=(f"{MIXER}.__init__", f"{MIXER}.get_kv_cache_spec"),
        source_sha256=dict.fromkeys(
            ("0.32.0", "0.33.0"), "8ef556fb0bbbeb533733980d6efa6b815f76961cfc6930b71fdeaa716315c87a"
        ),
    ),
    Override(
        name="gated-norm",
        members=(f"{MIXER}.norm",),
        where="vllm_twotower.model.context:mamba_mixer",
        why="On GPUs vLLM's falls back to separate operations for several groups, which its own kernel knows.",
        sources=(
            "vllm.model_executor.layers.mamba.mamba_mixer2:Mixer2RMSNormGated",
            "vllm.model_executor.layers.mamba.ops.layernorm_gated:rms_norm_gated",
        ),
        source_sha256=dict.fromkeys(
            ("0.32.0", "0.33.0"), "1f9f71f46cb2ba5a68e98e82c42dc20a67f1a93c73235d1de929f8b75832466b"
        ),
    ),
    Override(
        name="graph-manager",
        members=(
            f"{RUNNER}.cudagraph_utils:CudaGraphManager._init_candidates",
            f"{RUNNER}.cudagraph_utils:CudaGraphManager._capture_descs",
        ),
        where="vllm_twotower.engine.pass_graphs:PassGraphs",
        why="Passes are captured in the place of whole forward passes, by vLLM's own code.",
        sources=(
            f"{RUNNER}.cudagraph_utils:CudaGraphManager",
            f"{RUNNER}.cudagraph_utils:ModelCudaGraphManager",
        ),
        source_sha256={
            "0.32.0": "873279e435bad4cb3896451e05d87b05c19105233e7c04a2c7cafe9e761cf3e7",
            "0.33.0": "36f5561552005dff5e1e54ffb75b6476ad9d08764314eafe2b31ade7a10a19b5",
        },
    ),
    Override(
        name="denoiser-layers",
        members=(
            "vllm.config.compilation:CompilationConfig.static_forward_context",
            "vllm.model_executor.models.nemotron_h:NemotronHAttention.attn",
            "vllm.utils.torch_utils:_encode_layer_name",
        ),
        where="vllm_twotower.model.denoiser",
        why="The denoiser's layers have no cache: attention writes into the context layer's, Mamba reads its states.",
        sources=(
            "vllm.model_executor.models.nemotron_h:NemotronHAttention",
            "vllm.utils.torch_utils:_encode_layer_name",
            f"{ATTENTION}:Attention.__init__",
            f"{ATTENTION}:unified_kv_cache_update",
            f"{MIXER}.__init__",
        ),
        source_sha256={
            "0.32.0": "8a6b0582220bc8cc7971d8ad68bf0e8ddf032ed294203de1a7f69ac064f6cd4d",
            "0.33.0": "d0d4af1accccf3144d33ad24167504d28665c8c527584faf89948bf5d4bd2455",
        },
    ),
    Override(
        name="forward-context",
        members=("vllm.forward_context:ForwardContext.slot_mapping", "vllm.forward_context:ForwardContext.is_padding"),
        where="vllm_twotower.engine.pass_plan:AttentionInputs.use",
        why="The towers' rows are not those of vLLM's batch.",
        sources=("vllm.forward_context:ForwardContext", "vllm.forward_context:set_forward_context"),
        source_sha256={
            "0.32.0": "527c0a042f30d1262df30c400f5388abf1e2cfc891ff3a85860100bf4d48cf7a",
            "0.33.0": "1ef7fca4ca95244acd9a2898de8f2cbe9a433ee139f39a778e6b9a7f49d1aa51",
        },
    ),
    Override(
        name="group-memory",
        members=(f"{COMMUNICATOR}:_CPUSHMDistributed.group_name",),
        where="vllm_twotower.model.shared_memory:remove_group_names",
        why="The name of the segment through which ranks on a CPU exchange tensors is removed from /dev/shm.",
        sources=(
            f"{COMMUNICATOR}:CpuCommunicator.__init__",
            f"{COMMUNICATOR}:_CPUSHMDistributed.__init__",
            f"{COMMUNICATOR}:_CPUSHMDistributed.make_group_name",
        ),
        source_sha256=dict.fromkeys(
            ("0.32.0", "0.33.0"), "555813d377111b715152f9d8aa0d21505c4fce021b36c24c8c730c17b9321f47"
        ),
    ),
    Override(
        name="cpu-platform",
        members=("vllm.platforms.interface:Platform.ray_device_key",),
        where="vllm_twotower.platform:TwoTowerCpuPlatform",
        why="Ranks over Ray, processes and the default KV cache on CPUs; other models are refused over Ray as by vLLM.",
        sources=(
            "vllm.platforms.cpu:CpuPlatform.check_and_update_config",
            "vllm.v1.executor.ray_utils:initialize_ray_cluster",
            f"{WORKER}.__init__",
            f"{WORKER}.determine_available_memory",
        ),
        source_sha256={
            "0.32.0": "4c072329d85482e83208f52abd20d879ae15e1d71b25b728d52502e88ae14629",
            "0.33.0": "5861a9fd2f84a7d47f456cea0df7e8389a0b9d972afce8a1c8c6930bb228adc3",
        },
        applies_when=runs_on_cpu,
    ),
)
