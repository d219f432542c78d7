"""The processes of a run: the learner's ranks, the generators' engines and the Ray actors around them."""

import re
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field

from trace_async.config.section import OWN, built_in_or_own, require, section
from trace_async.config.task import Device, Dtype

ENGINES = ("torch", "sglang", "vllm", "fake")


@section("learner")
class LearnerConfig:
    """The DeepSpeed ranks that train the policy."""

    num_ranks: Annotated[int, Field(ge=1)] = 1
    """Data-parallel ranks, each a process (alias world size, num_gpus of the actor)."""
    device: Device = "auto"
    """Where a rank computes. auto: on a GPU where there is one (docs/clusters.md has the rule)."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """What DeepSpeed shares out among the ranks: 0 nothing, 1 the optimizer's state, 2 also gradients, 3 also
    weights."""
    dtype: Dtype = "float32"
    """Number format of weights and activations; with bfloat16, DeepSpeed keeps master weights in float32."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    """Peak learning rate of AdamW (alias lr). The default suits the small policies; real models take about 1e-6."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls from its peak to 0 over `num_updates`."""
    lr_warmup_updates: Annotated[int, Field(ge=0)] = 0
    """Updates over which the learning rate rises to its peak."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of Adam's second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this norm (alias clip_grad)."""
    minibatches: Annotated[int, Field(ge=1)] = 1
    """Optimizer steps per update (alias ppo mini-batches)."""
    packing: Literal["tree", "flat"] = "tree"
    """tree: prefixes that rollouts share are computed once | flat: every rollout by itself, as a reference."""
    max_tokens_per_micro_batch: Annotated[int, Field(ge=1)] = 8192
    """Tokens of one forward and backward pass of a rank (alias ppo_max_token_len_per_gpu)."""
    logprob_chunk_tokens: Annotated[int, Field(ge=1)] = 4096
    """Logits are made for so many tokens at a time, which bounds their memory."""
    gradient_checkpointing: bool = False
    """Keep only each layer's input and compute the rest again in the backward pass: less memory, a third more work."""
    lora_rank: Annotated[int, Field(ge=0, le=512)] = 0
    """Train adapters of this rank instead of all weights. 0: all weights."""
    reference_device: Device = "auto"
    """Where the frozen start policy of loss.kl_loss_coef lies. auto: with the learner, shared out under ZeRO-3 as the
    policy is; cpu leaves the GPU's memory to the policy."""
    weight_bucket_bytes: Annotated[int, Field(ge=1)] = 256 * 1024**2
    """How much of the weights is whole on a rank at a time (one tensor at least) on the way to the generators."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Any DeepSpeed option, handed on as it is."""
    num_threads: Annotated[int, Field(ge=1)] = 1
    """CPU threads of a rank, which Ray also reserves for it."""
    step_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds that the ranks may take for any one call, an update or its weights included."""

    @property
    def reference_is_partitioned(self) -> bool:
        """Over the ranks, as ZeRO-3 does with the policy; on a device of its own every rank holds it whole."""
        return self.zero_stage == 3 and self.reference_device == "auto"


@section("engine")
class EngineConfig:
    """The inference engine of each generator (alias rollout engine). `torch` is embedded; the others are servers."""

    backend: Annotated[str, built_in_or_own(ENGINES)] = "torch"
    """torch (embedded, needs nothing else) | sglang | vllm (`bash scripts/setup_engines.sh` installs them) | fake (for
    tests) | package.module:Class of your own (docs/own/engine.md)."""
    device: Device = "auto"
    """Where the engine computes. auto: on a GPU where there is one (docs/clusters.md has the rule)."""
    dtype: Dtype = "float32"
    """Number format of its weights and activations."""
    tensor_parallel_size: Annotated[int, Field(ge=1)] = 1
    """GPUs that share one copy of the model (alias tp)."""
    max_running_requests: Annotated[int, Field(ge=1)] = 64
    """Requests that are decoded together (alias max_num_seqs)."""
    kv_cache_tokens: Annotated[int, Field(ge=0)] = 65536
    """Tokens of the KV cache. 0: a server takes as many as its GPU has room for; torch keeps no prefixes."""
    prefix_cache: bool = True
    """Keep the KV of prefixes for later requests (alias enable_prefix_caching, radix cache)."""
    python: str = ""
    """Interpreter of the engine's own environment. Empty: that of `.venvs/<backend>`."""
    url: str = ""
    """Attach to a running server instead of starting one."""
    server_args: dict[str, Any] = field(default_factory=dict)
    """More flags for the server, handed on as they are."""
    weight_sync: Literal["memory", "disk", "collective"] = "memory"
    """How new weights reach a server: memory (a file in shared memory) | disk | collective (broadcast among GPUs)."""
    weight_delta: bool = False
    """Send a generator only what changed since the weights that it serves, checked against the whole. Fewer bytes
    between nodes (bfloat16 at a small learning rate); rank 0 and each generator keep a copy of the weights for it."""
    lora_rank: Annotated[int, Field(ge=0, le=512)] = 0
    """0: merged weights are sent. learner.lora_rank: only the adapter is, and the server adds it (vllm)."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 300.0
    """Seconds that starting an engine, loading weights into it or starting the predictor may take."""
    request_timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """Seconds that one request may take, not counting weight updates."""
    num_threads: Annotated[int, Field(ge=1)] = 1
    """CPU threads of the engine."""

    def __post_init__(self) -> None:
        require(
            self.backend in ENGINES or re.fullmatch(OWN, self.backend) is not None,
            "engine.backend",
            self.backend,
            f"expected one of {' | '.join(ENGINES)}, or package.module:Class for one of your own",
        )
        require(
            self.backend != "torch" or self.tensor_parallel_size == 1,
            "engine.tensor_parallel_size",
            self.tensor_parallel_size,
            "the torch engine does not split a model: 1, or engine.backend=sglang or vllm",
        )
        merged = "; or engine.lora_rank=0, for merged weights"
        if self.lora_rank:
            require(self.backend == "vllm", "engine.backend", self.backend, "only vllm takes LoRA adapters" + merged)
            require(self.weight_sync != "collective", "engine.weight_sync", "collective", "not of adapters" + merged)
            require(not self.url, "engine.url", self.url, "adapters need a server that is started for them" + merged)


@section("actors")
class ActorsConfig:
    """The Ray actors, and the cluster they are placed on."""

    num_generators: Annotated[int, Field(ge=1)] = 1
    """Generators, each with an engine of its own."""
    min_generators: Annotated[int, Field(ge=0)] = 0
    """Fewest generators that a run scales down to when they stand idle. 0: actors.num_generators."""
    max_generators: Annotated[int, Field(ge=0)] = 0
    """Most generators that a run scales up to while the learner waits for them. 0: actors.num_generators."""
    num_prompt_actors: Annotated[int, Field(ge=1)] = 1
    """Processes that host prompts: they run environments and grow rollout trees."""
    prompts_per_actor: Annotated[int, Field(ge=1)] = 256
    """Prompts that one such process hosts at a time. 1: a process per prompt."""
    max_staleness: Annotated[int, Field(ge=0)] = 1
    """Weight versions that a tree may lag at training (alias off-policyness η). 0: the synchronous trainer."""
    max_rollout_retries: Annotated[int, Field(ge=0)] = 2
    """How often a rollout that broke down is tried again."""
    tree_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds that one prompt's tree may take."""
    ray_address: str = ""
    """The Ray cluster to join, `auto` on one of its machines. Empty: a local Ray is started."""
    generator_cpus: Annotated[float, Field(ge=0)] = 1.0
    """CPUs that Ray reserves for a generator."""
    generator_gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs that Ray reserves for a generator: engine.tensor_parallel_size, or a part of one. 0: its share of what is
    there, by the rule in docs/clusters.md."""
    learner_gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs that Ray reserves for each rank of the learner. 0: its share."""
    predictor_gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs that Ray reserves for each process of the predictor. 0: its share."""
    num_nodes: Annotated[int, Field(ge=1)] = 1
    """Machines that `--dry-run` plans for; nothing else reads it."""
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    """GPUs of one machine that `--dry-run` plans for; nothing else reads it. 0: as many as this machine has."""
    gpu_memory_gib: Annotated[float, Field(gt=0)] = 80.0
    """Memory of one GPU, in GiB, that `--dry-run` plans for; nothing else reads it."""

    def __post_init__(self) -> None:
        require(
            self.min_generators <= self.num_generators,
            "actors.min_generators",
            self.min_generators,
            f"must not exceed actors.num_generators={self.num_generators}",
        )
        require(
            self.max_generators == 0 or self.max_generators >= self.num_generators,
            "actors.max_generators",
            self.max_generators,
            f"0 (actors.num_generators) or at least actors.num_generators={self.num_generators}",
        )

    @property
    def most_generators(self) -> int:
        """What a local Ray has to have room for."""
        return self.max_generators or self.num_generators
