"""The table of patches: every change to vLLM that this package makes at run time, and when it can go.

It imports neither torch nor vLLM: every process of vLLM reads it at its start.
"""

from vllm_twotower.patches.registry import (
    Patch,
    configuration_asks_for_triton,
    everywhere,
    in_one_of_several_ranks,
    kernel_cannot_launch,
    runs_on_cpu,
    runs_on_cpu_without_triton,
    worker_asks_for_triton,
)

# vLLM's own plan for running these kernels on a CPU.
CPU_KERNELS = "https://github.com/vllm-project/vllm/pull/55847"
RUNNER_ON_CPU = f"{CPU_KERNELS} and https://github.com/vllm-project/vllm/issues/57684"
RUNNER_WITHOUT_TRITON = "vLLM offers Model Runner V2 on a CPU without Triton"
WITHOUT_TRITON = "vLLM runs this kernel on a CPU without Triton"
TRACES_HAVE_ROOM = "vLLM hands what a model's plugin returns of a token on to the outputs and responses of its request"
QUEUES_STAY = (
    "vLLM frees a queue's memory when the queue is collected. A killed rank, or an engine that takes too long to end "
    "and is killed with Python's resource tracker, leaves up to 240 MiB in /dev/shm, until an engine finds no space."
)

START_PATCHES = (
    Patch(
        name="model-runner-choice",
        target="vllm.config.vllm:VllmConfig.use_v2_model_runner",
        function="cpu_runner.choice:choose",
        wraps=True,
        what="VllmConfig.use_v2_model_runner does not ask for Triton if the model is TwoTower.",
        why="vLLM falls back to Model Runner V1, which cannot run diffusion models.",
        upstream=RUNNER_ON_CPU,
        remove_when=RUNNER_WITHOUT_TRITON,
        applies_when=runs_on_cpu_without_triton,
        sources=("vllm.config.vllm:VllmConfig.use_v2_model_runner",),
        source_sha256={
            "0.32.0": "7b27015e792732e60932813a94470259e979e701b719edcda4e319a4a5da4ca5",
            "0.33.0": "0b1f41e4465796fec49f59d02e92294b117a83099d0ac25df3944ad943f77583",
        },
    ),
    Patch(
        name="model-runner-validation",
        target="vllm.config.vllm:VllmConfig._validate_v2_model_runner",
        function="cpu_runner.choice:for_two_tower_as_if_with_triton",
        wraps=True,
        what="VllmConfig._validate_v2_model_runner does not ask for Triton if the model is TwoTower.",
        why="The check at the end of the configuration rejects the runner that the first patch made it choose.",
        upstream=RUNNER_ON_CPU,
        remove_when=RUNNER_WITHOUT_TRITON,
        applies_when=configuration_asks_for_triton,
        sources=("vllm.config.vllm:VllmConfig._validate_v2_model_runner",),
        source_sha256={"0.32.0": "022544512bec491658f401ac2f959874a57c61d68f4ce643b3fdca1d8f51cb2f"},
    ),
    Patch(
        name="model-runner-worker",
        target="vllm.v1.worker.gpu_worker:Worker.__init__",
        function="cpu_runner.choice:of_worker",
        wraps=True,
        what="Worker.__init__ does not ask for Triton if the model is TwoTower.",
        why="The check, which vLLM 0.32 has in the configuration, rejects the runner that the first patch chose.",
        upstream=RUNNER_ON_CPU,
        remove_when=RUNNER_WITHOUT_TRITON,
        applies_when=worker_asks_for_triton,
        sources=("vllm.v1.worker.gpu_worker:Worker.__init__",),
        source_sha256={"0.33.0": "c7d46433b996412b32c82c511631963a52ee56dea1cc714f3822b12b6b4fe150"},
    ),
    Patch(
        name="sampling-params-validation",
        target="vllm.sampling_params:SamplingParams._validate_diffusion",
        function="sampling_params:with_our_rules",
        wraps=True,
        what="SamplingParams._validate_diffusion calls vllm_twotower.options.validate_sampling_params for TwoTower.",
        why="vLLM rejects temperature, seed and others for every diffusion model; the TwoTower sampler honours some.",
        upstream="not reported; the check came with https://github.com/vllm-project/vllm/pull/45418",
        remove_when="vLLM lets a diffusion model say which sampling parameters it supports",
        applies_when=everywhere,
        sources=(
            "vllm.sampling_params:SamplingParams._validate_diffusion",
            "vllm.sampling_params:SamplingParams.verify",
        ),
        source_sha256=dict.fromkeys(
            ("0.32.0", "0.33.0"), "dc2861cc0a3a6bd5ca7db84c05c2394eec1b91d05d733643059dd4920fa548d0"
        ),
    ),
    Patch(
        name="structured-outputs-validation",
        target="vllm.sampling_params:SamplingParams._validate_structured_outputs",
        function="structured_outputs:as_for_causal_models",
        wraps=True,
        what="SamplingParams._validate_structured_outputs checks a TwoTower request as one for a causal model.",
        why=(
            "vLLM refuses grammars for every diffusion model; TwoTower's autoregressive requests can have "
            "them, and blocks are refused one by our own validation just before."
        ),
        upstream="https://github.com/vllm-project/vllm/issues/45436",
        remove_when="vLLM lets a diffusion model say which requests can have structured outputs",
        applies_when=everywhere,
        sources=(
            "vllm.sampling_params:SamplingParams._validate_structured_outputs",
            "vllm.sampling_params:SamplingParams.verify",
        ),
        source_sha256=dict.fromkeys(
            ("0.32.0", "0.33.0"), "1fdadd0a01671330fd43daa28336d7e11011db1d74cd2bf91293d1f790068c1c"
        ),
    ),
    Patch(
        name="diffusion-metrics",
        target="vllm.v1.metrics.loggers:PrometheusStatLogger._spec_decoding_cls",
        function="diffusion_metrics:spec_decoding_cls",
        wraps=False,
        what="PrometheusStatLogger makes vllm_twotower.engine.metrics.TwoTowerProm if the engine serves TwoTower.",
        why=(
            "vLLM has no metrics of context passes and finished blocks, and a logger of our own would have to"
            " be named by every program that builds an engine."
        ),
        upstream="not reported",
        remove_when="a scheduler can send statistics of its own, and a plugin can add Prometheus metrics for them",
        applies_when=everywhere,
        sources=(
            "vllm.v1.spec_decode.metrics:SpecDecodingProm",
            "vllm.v1.spec_decode.metrics:SpecDecodingStats",
        ),
        source_sha256=dict.fromkeys(
            ("0.32.0", "0.33.0"), "fc923bc5e5aa4dfaa924dfdb1e102c5cf99b4c716250a2d48c374b62451aa21d"
        ),
    ),
    Patch(
        name="shared-memory-names-executor",
        target="vllm.v1.executor.multiproc_executor:MultiprocExecutor._post_init_executor",
        function="shared_memory_names:of_executor",
        wraps=True,
        what="MultiprocExecutor and RayExecutorV2, ready, unlink the memory of a TwoTower engine's queue.",
        why=QUEUES_STAY,
        upstream="not reported",
        remove_when="vLLM's message queues leave nothing in /dev/shm when their processes are killed",
        applies_when=everywhere,
        sources=(
            "vllm.v1.executor.multiproc_executor:MultiprocExecutor._post_init_executor",
            "vllm.v1.executor.multiproc_executor:MultiprocExecutor._init_executor",
            "vllm.v1.executor.ray_executor_v2:RayExecutorV2._init_executor",
            "vllm.distributed.device_communicators.shm_broadcast:MessageQueue.wait_until_ready",
            "vllm.distributed.device_communicators.shm_broadcast:MessageQueue.create_from_handle",
            "vllm.distributed.device_communicators.shm_broadcast:ShmRingBuffer.__init__",
            "vllm.distributed.device_communicators.shm_broadcast:ShmRingBuffer.__del__",
        ),
        source_sha256={
            "0.32.0": "c90c453ba7699b0bd307567d465dd98b7ae028ad8c6146447f25bc644e6d42c6",
            "0.33.0": "585c22c1c4bc086e3dd32f777cb1d9064bfb90e1eef83a6e94dfa3b2d25d9efd",
        },
    ),
    Patch(
        name="lost-options",
        target="vllm.entrypoints.serve.engine.serving:BaseServing._check_model",
        function="lost_options:refusing_options",
        wraps=True,
        what=(
            "BaseServing._check_model, with which every request begins, refuses diffusion_* in vllm_xargs of "
            "a TwoTower model's beam search, and diffusion_trace where responses have no traces."
        ),
        why=(
            "BeamSearchParams has no place for them: vLLM drops vllm_xargs of a beam search in silence. Traces are "
            "put into the responses of completions and chats."
        ),
        upstream="not reported",
        remove_when=(
            "vLLM gives the requests of a beam search the vllm_xargs of the request they belong to, and every response "
            "has room for what a plugin returns"
        ),
        applies_when=everywhere,
        sources=(
            "vllm.entrypoints.serve.engine.serving:BaseServing._check_model",
            "vllm.entrypoints.openai.completion.serving:OpenAIServingCompletion.render_completion_request",
            "vllm.entrypoints.openai.completion.protocol:CompletionRequest.to_beam_search_params",
            "vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat.render_chat_request",
            "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest.to_beam_search_params",
            "vllm.sampling_params:BeamSearchParams",
        ),
        source_sha256={
            "0.32.0": "20bbd15a21de69ff89646f6aa1bfc4daa15e71d56fe60f57a657f77e420afbf1",
            "0.33.0": "30f552f80bc8ff139dc12a1dc8794d6bd776f6161d8c2cba7761b5c93d0e09b4",
        },
    ),
    Patch(
        name="open-requests-of-a-server",
        target="vllm.v1.engine.async_llm:AsyncLLM.shutdown",
        function="open_requests:ending_open_requests",
        wraps=True,
        what="AsyncLLM.shutdown gives the requests that are still open the error of a dead engine.",
        why=(
            "It cancels the task that hands outputs and errors to them, often before it has handed on the "
            "error. Their clients then wait for an answer, and the server waits for their connections, "
            "without end."
        ),
        upstream="not reported",
        remove_when="a vLLM engine that is shut down, or whose process is killed, ends the requests that are open",
        applies_when=everywhere,
        sources=(
            "vllm.v1.engine.async_llm:AsyncLLM.shutdown",
            "vllm.v1.engine.async_llm:AsyncLLM._run_output_handler",
            "vllm.v1.engine.output_processor:OutputProcessor.propagate_error",
        ),
        source_sha256={
            "0.32.0": "fcd3a8b03f1887ef38a68c396b23706996a106b1f739d63ac17fb38067bbf0cc",
            "0.33.0": "a78c9be3e2ab186214c7bda97d75e1fe74b3333216bcc5eb32891208bdd53986",
        },
    ),
    Patch(
        name="open-requests-offline",
        target="vllm.v1.engine.core_client:MPClient.shutdown",
        function="open_requests:ending_waiting",
        wraps=True,
        what="MPClient.shutdown wakes whoever waits for the output of the engine's process with an error.",
        why="If the process is killed, LLM.generate waits for its output without end.",
        upstream="not reported",
        remove_when="a vLLM engine that is shut down, or whose process is killed, ends the requests that are open",
        applies_when=everywhere,
        sources=(
            "vllm.v1.engine.core_client:MPClient.shutdown",
            "vllm.v1.engine.core_client:MPClient.start_engine_core_monitor",
            "vllm.v1.engine.core_client:BackgroundResources.__call__",
            "vllm.v1.engine.core_client:SyncMPClient.__init__",
            "vllm.v1.engine.core_client:SyncMPClient.get_output",
        ),
        source_sha256={
            "0.32.0": "18e273fc8958960b5ae717ec38154f3d0d9764aea13f1df92acf02e595c70306",
            "0.33.0": "bd85d74be7aca6a843cdfddcd33d39ef48a472a3bc77f31e9e2dc65f82dde1f6",
        },
    ),
    Patch(
        name="request-errors",
        target="vllm.v1.engine.output_processor:OutputProcessor.process_outputs",
        function="request_errors:with_reasons",
        wraps=True,
        what=(
            "OutputProcessor.process_outputs gives a request that ended with an error and a reason an "
            "exception that says the reason."
        ),
        why="vLLM's server says 'Internal server error', whatever the reason.",
        upstream="not reported",
        remove_when="vLLM 0.33 is the oldest supported: there an output has an `error`, which the server answers with",
        applies_when=everywhere,
        sources=(
            "vllm.v1.engine.output_processor:OutputProcessor.process_outputs",
            "vllm.v1.engine.output_processor:RequestOutputCollector",
            "vllm.v1.engine.async_llm:AsyncLLM.generate",
            "vllm.exceptions:GracefulHTTPError",
        ),
        source_sha256={
            "0.32.0": "c6f795c223812cb0d937b301e83777ad50792b214cc4f25299b73ff5de93abae",
            "0.33.0": "c26f236de8ef4b81c21ff8c4cc8cd1bdcf902c73a9e830baa4235144289ebc7c",
        },
    ),
)


def _of_response(
    name: str, target: str, function: str, what: str, response: str, source_sha256: dict[str, str]
) -> Patch:
    """The patch of a method that makes responses; ``response`` is the class of what it puts a trace into."""
    return Patch(
        name=name,
        target=target,
        function=f"trace_responses:{function}",
        wraps=True,
        what=what,
        why="vLLM's responses have no room for what a plugin returns of a token beside its log-probabilities.",
        upstream="not reported",
        remove_when=TRACES_HAVE_ROOM,
        applies_when=everywhere,
        sources=(target, f"{target.partition(':')[0].rpartition('.')[0]}.protocol:{response}"),
        source_sha256=source_sha256,
    )


_COMPLETION = "vllm.entrypoints.openai.completion.serving:OpenAIServingCompletion"
_CHAT = "vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat"

TRACE_PATCHES = (
    Patch(
        name="traces-of-requests",
        target="vllm.v1.engine.output_processor:OutputProcessor.process_outputs",
        function="trace_outputs:keeping_traces",
        wraps=True,
        what="OutputProcessor.process_outputs keeps the traces that a TwoTower engine sends with its outputs.",
        why="vLLM would hand them on as parameters of a KV transfer, and only those of a request's last output.",
        upstream="not reported",
        remove_when=TRACES_HAVE_ROOM,
        applies_when=everywhere,
        sources=(
            "vllm.v1.engine.output_processor:OutputProcessor.process_outputs",
            "vllm.v1.engine:EngineCoreOutput",
        ),
        source_sha256={
            "0.32.0": "a0c987d42835830de0ea979c647aa7b5b2f635bfdadd4c45b55017bbb61f8a44",
            "0.33.0": "427f3fa81d79a18734484b86396c3eaa277204f8b8f4c6a8ac2e5f9ac3c817ae",
        },
    ),
    Patch(
        name="traces-of-outputs",
        target="vllm.v1.engine.output_processor:RequestState._new_completion_output",
        function="trace_outputs:with_trace",
        wraps=True,
        what="RequestState._new_completion_output makes a TracedCompletionOutput of a request that has a trace.",
        why="vLLM's CompletionOutput has no room for what a plugin returns of a token beside its log-probabilities.",
        upstream="not reported",
        remove_when=TRACES_HAVE_ROOM,
        applies_when=everywhere,
        sources=(
            "vllm.v1.engine.output_processor:RequestState._new_completion_output",
            "vllm.v1.engine.output_processor:RequestState.make_request_output",
            "vllm.outputs:CompletionOutput",
            "vllm.outputs:RequestOutput.add",
        ),
        source_sha256={
            "0.32.0": "96d732ab22678bb5f3cc7a3719bb358010f46d7d8754eedf33cc73f1a6a1ea97",
            "0.33.0": "f6fef2b7cab36e7b0152addfdf9f7c43ffe5c9e8d20f4c64d82e82f99c9e473a",
        },
    ),
    _of_response(
        "trace-of-a-completion",
        f"{_COMPLETION}.request_output_to_completion_response",
        "in_completion",
        "OpenAIServingCompletion.request_output_to_completion_response gives choices their traces.",
        "CompletionResponseChoice",
        {
            "0.32.0": "8182505df31a72c61906ea75d89ed1df8f416105310443ad15aef08c14fb3db4",
            "0.33.0": "0f050d161c3fa38756935750624bb1ab84e1e278dd2dfc64500119f0a41b442f",
        },
    ),
    _of_response(
        "trace-of-a-streamed-completion",
        f"{_COMPLETION}.completion_stream_generator",
        "in_stream",
        "OpenAIServingCompletion.completion_stream_generator gives chunks the traces of their tokens.",
        "CompletionResponseStreamChoice",
        {
            "0.32.0": "77185dace1f7541f580c850129a290c8764809ca035cd12cf66cf48da0f16c32",
            "0.33.0": "dedd4fb75599f547ad63736260d9a793761abfaef20e305c4b7bdebe1efd67b4",
        },
    ),
    _of_response(
        "trace-in-a-chat",
        f"{_CHAT}.chat_completion_full_generator",
        "in_chat",
        "OpenAIServingChat.chat_completion_full_generator gives choices their traces.",
        "ChatCompletionResponseChoice",
        {
            "0.32.0": "6a87f2c77bc7aab0be04c02b7b938d1506796d5670533801b1ea191dd42372d2",
            "0.33.0": "def11993187dbaad7a0fa75252bba28ac13a093899461a97436f879c179e3cfe",
        },
    ),
    _of_response(
        "trace-in-a-streamed-chat",
        f"{_CHAT}.chat_completion_stream_generator",
        "in_stream",
        "OpenAIServingChat.chat_completion_stream_generator gives chunks the traces of their tokens.",
        "ChatCompletionResponseStreamChoice",
        {
            "0.32.0": "1d9372b7039126ccac5c92c1220181d5c68bc5e42803d3f359665e05c0bdd451",
            "0.33.0": "f405bde526d663a8710f543eb4547b79f4996cce33df18f50c3b0a65bc74341c",
        },
    ),
)


def _kernel(
    target: str, launcher: str, function: str, why: str, source_sha256: dict[str, str], language: str = "numpy"
) -> Patch:
    """The patch of a Triton kernel; ``launcher`` is the function or method beside it that launches it."""
    return Patch(
        name=function.partition(":")[2].replace("_", "-"),
        target=target,
        function=function,
        wraps=False,
        what=f"Runs the kernel of {launcher} in {language}.",
        why=why,
        upstream=CPU_KERNELS,
        remove_when=WITHOUT_TRITON,
        applies_when=kernel_cannot_launch(target),
        sources=(target, f"{target.partition(':')[0]}:{launcher.partition('.')[0]}"),
        source_sha256=source_sha256,
    )


WORKER_PATCHES = (
    Patch(
        name="shared-memory-names-rank",
        target="vllm.distributed.device_communicators.shm_broadcast:MessageQueue.wait_until_ready",
        function="shared_memory_names:of_rank",
        wraps=True,
        what="MessageQueue.wait_until_ready also unlinks the memory of the queue, if this process has made it.",
        why=QUEUES_STAY,
        upstream="not reported",
        remove_when="vLLM's message queues leave nothing in /dev/shm when their processes are killed",
        applies_when=in_one_of_several_ranks,
        sources=(
            "vllm.distributed.device_communicators.shm_broadcast:MessageQueue.wait_until_ready",
            "vllm.distributed.device_communicators.shm_broadcast:MessageQueue.create_from_handle",
            "vllm.distributed.device_communicators.shm_broadcast:ShmRingBuffer.__init__",
            "vllm.distributed.device_communicators.shm_broadcast:ShmRingBuffer.__del__",
        ),
        source_sha256=dict.fromkeys(
            ("0.32.0", "0.33.0"), "87a0cee33b9a1ef352ea7f5bebdbf7c3e3177549261bbf224a4e8cb310736eda"
        ),
    ),
    Patch(
        name="triton-placeholder-next-power-of-2",
        target="vllm.triton_utils:triton",
        function="cpu_runner.triton_placeholder:with_next_power_of_2",
        wraps=True,
        what="Gives the placeholder for the Triton module the function next_power_of_2.",
        why="Without it the launchers of prepare_prefill_inputs and expand_idx_mapping raise AttributeError.",
        upstream=CPU_KERNELS,
        remove_when=(
            "vLLM's TritonPlaceholder has next_power_of_2, or vLLM runs these kernels on a CPU without Triton"
        ),
        applies_when=runs_on_cpu_without_triton,
        sources=("vllm.triton_utils.importing:TritonPlaceholder",),
        source_sha256=dict.fromkeys(
            ("0.32.0", "0.33.0"), "7cfbb1b9e83a361d1662b7e1263c9a3e8bcaafa8692d84950e91f877c982d004"
        ),
    ),
    _kernel(
        "vllm.v1.worker.gpu.buffer_utils:_apply_write_kernel",
        launcher="StagedWriteTensor.apply_write",
        function="cpu_runner.staged_writes:apply_write",
        why="Without Triton no new request and no new block ever reaches the worker's tables.",
        source_sha256={
            "0.32.0": "229364af666b85e94b57156473d022dd67ff6f814fc3df00964cabff1547651c",
            "0.33.0": "1d8ad0f41668238cbe6e0498026ca87d70e48e05b00457f596f1c1d75cf0fa95",
        },
    ),
    Patch(
        name="fused-apply-write",
        target="vllm.v1.worker.gpu.buffer_utils:FusedStagedWriter.apply",
        function="cpu_runner.staged_writes:apply_by_group",
        wraps=False,
        what="FusedStagedWriter.apply lets each KV-cache group's table apply its own staged writes.",
        why="Upstream hands all groups to one Triton kernel as raw pointers, which numpy cannot write through.",
        upstream=CPU_KERNELS,
        remove_when=WITHOUT_TRITON,
        applies_when=kernel_cannot_launch("vllm.v1.worker.gpu.buffer_utils:_apply_write_kernel"),
        sources=("vllm.v1.worker.gpu.buffer_utils:FusedStagedWriter",),
        source_sha256={
            "0.32.0": "b9f2a612a2d85492eb855f0c05f60620317562fb567c6e7027fd10d5f047ad97",
            "0.33.0": "7b25beb5bb2534200827ec7c8b6ee88ca72fa2f92c0c28e9f59be6e1081b056e",
        },
    ),
    _kernel(
        "vllm.v1.worker.gpu.input_batch:_prepare_prefill_inputs_kernel",
        launcher="prepare_prefill_inputs",
        function="cpu_runner.input_batch:prepare_prefill_inputs",
        why="Without Triton prompts never reach the model's input.",
        source_sha256=dict.fromkeys(
            ("0.32.0", "0.33.0"), "2f1d468bc34d727f65390ec20135926b7d009a411e921ac118446300d692b980"
        ),
    ),
    _kernel(
        "vllm.v1.worker.gpu.input_batch:_prepare_pos_seq_lens_kernel",
        launcher="prepare_pos_seq_lens",
        function="cpu_runner.input_batch:prepare_pos_seq_lens",
        why="Without Triton no step can be prepared.",
        source_sha256=dict.fromkeys(
            ("0.32.0", "0.33.0"), "2776a359c20cbe16f3cdc3715038d26bd55788cdc06bc43b14785fa8a2f36f1f"
        ),
    ),
    _kernel(
        "vllm.v1.worker.gpu.input_batch:_combine_sampled_and_draft_tokens_kernel",
        launcher="combine_sampled_and_draft_tokens",
        function="cpu_runner.input_batch:combine_sampled_and_draft_tokens",
        why="Without Triton the canvas, which vLLM carries as draft tokens, never reaches the model's input.",
        source_sha256=dict.fromkeys(
            ("0.32.0", "0.33.0"), "6da1eaeaa76e19cf05b50fcac2b71303eaaa181c9fe0912a940e82e36b7aa436"
        ),
    ),
    _kernel(
        "vllm.v1.worker.gpu.input_batch:_post_update_kernel",
        launcher="post_update",
        function="cpu_runner.input_batch:post_update",
        why="Without Triton no step's result can be booked.",
        source_sha256={
            "0.32.0": "5a5499627dcf75f7b8b49987ac226361da31bb8cb874efacb28adc18832e6c84",
            "0.33.0": "a35cb00c72025041fe5dcaeb28324b4180eefc1ebe3be6e0fa83c02b991c4450",
        },
    ),
    _kernel(
        "vllm.v1.worker.gpu.input_batch:_post_update_num_computed_tokens_kernel",
        launcher="post_update_num_computed_tokens",
        function="cpu_runner.input_batch:post_update_num_computed_tokens",
        why="Without Triton pipeline stages before the last cannot count their computed tokens.",
        source_sha256=dict.fromkeys(
            ("0.32.0", "0.33.0"), "eb756afbbbceb495e381cb4d7751925939f539ce9b378135b12096aa5cb8fb2a"
        ),
    ),
    _kernel(
        "vllm.v1.worker.gpu.input_batch:_expand_idx_mapping_kernel",
        launcher="expand_idx_mapping",
        function="cpu_runner.input_batch:expand_idx_mapping",
        why="Without Triton canvas positions cannot be mapped back to their requests.",
        source_sha256=dict.fromkeys(
            ("0.32.0", "0.33.0"), "f6155e156c610b8962308f4877d010ee6af9dc98b5f9e052750c0ba0312c46ad"
        ),
    ),
    Patch(
        name="gather-block-tables",
        target="vllm.v1.worker.gpu.block_table:BlockTables.gather_block_tables",
        function="cpu_runner.block_tables:gather_block_tables",
        wraps=False,
        what="BlockTables.gather_block_tables copies the step's block tables in numpy.",
        why="Without Triton attention and Mamba layers get no block tables.",
        upstream=CPU_KERNELS,
        remove_when=WITHOUT_TRITON,
        applies_when=kernel_cannot_launch("vllm.v1.worker.gpu.block_table:_gather_block_tables_kernel"),
        sources=(
            "vllm.v1.worker.gpu.block_table:BlockTables.gather_block_tables",
            "vllm.v1.worker.gpu.block_table:_gather_block_tables_kernel",
        ),
        source_sha256={
            "0.32.0": "19358182001c49bfc4f7df9f9d433752932912aa948ccda3dc996b57c7fc9bc9",
            "0.33.0": "e16dfcc4780bc05ef50a57797a92267f53926a852c82c16eb5de5f0e61371028",
        },
    ),
    Patch(
        name="compute-slot-mappings",
        target="vllm.v1.worker.gpu.block_table:BlockTables.compute_slot_mappings",
        function="cpu_runner.block_tables:compute_slot_mappings",
        wraps=False,
        what="BlockTables.compute_slot_mappings computes the tokens' places in the KV caches in numpy.",
        why="Without Triton nothing can be written to a KV cache.",
        upstream=CPU_KERNELS,
        remove_when=WITHOUT_TRITON,
        applies_when=kernel_cannot_launch("vllm.v1.worker.gpu.block_table:_compute_slot_mappings_kernel"),
        sources=(
            "vllm.v1.worker.gpu.block_table:BlockTables.compute_slot_mappings",
            "vllm.v1.worker.gpu.block_table:_compute_slot_mappings_kernel",
        ),
        source_sha256=dict.fromkeys(
            ("0.32.0", "0.33.0"), "6ee72028d2af75ee373079625ffc33a766482c7e61fa484b4645624e89b2fbeb"
        ),
    ),
    _kernel(
        "vllm.v1.worker.utils:_zero_kv_blocks_kernel",
        launcher="KVBlockZeroer.zero_block_ids",
        function="cpu_runner.kv_zeroing:zero_kv_blocks",
        why="Hybrid models have new blocks zeroed; without Triton the first allocation fails.",
        source_sha256=dict.fromkeys(
            ("0.32.0", "0.33.0"), "dcef37dfe7494f36f77cdf4ba0b1bc93ca8703026fcf4bb04c0d6ec134317300"
        ),
    ),
    _kernel(
        "vllm.v1.worker.gpu.sample.logprob:_topk_log_softmax_kernel",
        launcher="compute_token_logprobs",
        function="cpu_runner.logprobs:topk_log_softmax",
        why="Without Triton no log-probability can be computed.",
        language="torch",
        source_sha256=dict.fromkeys(
            ("0.32.0", "0.33.0"), "ce4b7f8356085d2dd66a8032714f053e1c16fd246f3f3e2fbba77eb2869d2fcf"
        ),
    ),
    _kernel(
        "vllm.v1.worker.gpu.sample.logprob:_ranks_kernel",
        launcher="compute_topk_scores",
        function="cpu_runner.logprobs:ranks",
        why="Without Triton log-probabilities, which vLLM returns with their tokens' ranks, cannot be returned.",
        language="torch",
        source_sha256=dict.fromkeys(
            ("0.32.0", "0.33.0"), "4ec52f0eb9fd47c565fc41628c79b2a1f435e1fda25f687d7e50d8a751f5d994"
        ),
    ),
    _kernel(
        "vllm.v1.worker.gpu.sample.prompt_logprob:_prompt_logprobs_token_ids_kernel",
        launcher="get_prompt_logprobs_token_ids",
        function="cpu_runner.logprobs:prompt_logprobs_token_ids",
        why="Without Triton the prompt's log-probabilities have no tokens to be looked up for.",
        source_sha256=dict.fromkeys(
            ("0.32.0", "0.33.0"), "e685684f70d43f9eb03911bb01d359417e1e60e6866f8420895675fb2cf4c900"
        ),
    ),
    Patch(
        name="embedding-mask",
        target="vllm.model_executor.layers.vocab_parallel_embedding:get_masked_input_and_mask",
        function="embedding_mask:uncompiled",
        wraps=True,
        what="get_masked_input_and_mask runs as it is written, in the processes of TwoTower's ranks.",
        why="It is compiled when a sharded embedding first sees tokens: seconds of the first request.",
        upstream="not reported",
        remove_when="vLLM compiles it before the first request, or not on CPUs",
        applies_when=runs_on_cpu,
        sources=("vllm.model_executor.layers.vocab_parallel_embedding:get_masked_input_and_mask",),
        source_sha256=dict.fromkeys(
            ("0.32.0", "0.33.0"), "526bdd1bf105489fc7d76472014d6fc3526de12b7cd70647ecb96436d124e77b"
        ),
    ),
    Patch(
        name="pass-graphs",
        target="vllm.v1.worker.gpu.model_runner:ModelCudaGraphManager",
        function="pass_graphs:for_two_tower",
        wraps=True,
        what="GPUModelRunner makes vllm_twotower.engine.pass_graphs.PassGraphs if the model is TwoTower.",
        why=(
            "vLLM captures a whole forward pass for a batch of one width, and replays it in the place of the model;"
            " a TwoTower step makes several passes, each of other rows and widths."
        ),
        upstream="not reported",
        remove_when="a model state can bring the runner's graph manager, or only inner graphs",
        applies_when=everywhere,
        sources=(
            "vllm.v1.worker.gpu.cudagraph_utils:BatchExecutionDescriptor",
            "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager",
            "vllm.v1.worker.gpu.cudagraph_utils:profile_cudagraph_memory",
            "vllm.v1.worker.gpu.cudagraph_utils:_teardown_profiling_state",
            "vllm.v1.worker.gpu.model_runner:GPUModelRunner.capture_model",
        ),
        source_sha256={
            "0.32.0": "736fc08eb1b08927394a937c3afe5c21a1cbbc1491384307a11f9132204f448d",
            "0.33.0": "5afa75251d2a8592f254402ec76990cef284d14a8d83a63810855cb127a7b094",
        },
    ),
    Patch(
        name="grammar-bitmask",
        target="vllm.v1.worker.gpu.structured_outputs:StructuredOutputsWorker.apply_grammar_bitmask",
        function="grammar_bitmask:keeping_bitmask",
        wraps=True,
        what="StructuredOutputsWorker.apply_grammar_bitmask leaves the bitmask in TwoTower's StepLogits.",
        why=(
            "Upstream expects one tensor with the batch's logit rows; TwoTower's rows lie in two, by tower. "
            "Its kernel does not run on a CPU without Triton either."
        ),
        upstream="not reported",
        remove_when="a custom sampler gets the grammar's bitmask itself",
        applies_when=everywhere,
        sources=("vllm.v1.worker.gpu.structured_outputs:StructuredOutputsWorker.apply_grammar_bitmask",),
        source_sha256={
            "0.32.0": "9aa022bc39639a0d0dbdfa61fb0c2664b55e13b20e1d8814931affbcb5d8c8d9",
            "0.33.0": "ab58a087cbd26fff9c06b18de0c8ee859f3f082fcc30c92154c074eda7a63db1",
        },
    ),
)

PATCHES = START_PATCHES + TRACE_PATCHES + WORKER_PATCHES
