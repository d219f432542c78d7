"""What a run will ask of the machines, worked out before anything is started: placement, memory, batch arithmetic.

Memory of training follows ZeRO (Rajbhandari et al., arXiv 1910.02054, section 3 and 5): with bf16, 2 bytes of weights,
2 of gradients and 12 of fp32 master weights and Adam moments per parameter; with fp32, 4, 4 and 8. ZeRO 1 shares the
optimizer's part among the ranks, ZeRO 2 the gradients too, ZeRO 3 also the weights. Activations follow the counting of
Korthikanti et al. (arXiv 2205.05198) for a SwiGLU block without an attention matrix. Estimates, not promises: kernels'
workspaces and fragmentation are covered by RESERVE_GIB per process.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from trace_async.config import Config, ConfigError
from trace_async.run.model_folder import read_config, require_context, require_plain_decoder
from trace_async.run.placement import num_gpus_here, place

GIB = 2**30
RESERVE_GIB = 4.0
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
# What Python, torch and transformers take by themselves in the memory of the machine; beside a GPU it does not count.
LIBRARIES_BYTES = int(0.45 * GIB)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a Qwen3 or Llama model, as in its config.json."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tied: bool
    qk_norm: bool

    def num_adapter_parameters(self, rank: int) -> int:
        """Return the parameters of LoRA on every linear layer but the head: rank · (in + out) each."""
        h, d = self.hidden_size, self.head_dim
        attention = 2 * (h + self.num_heads * d) + 2 * (h + self.num_kv_heads * d)
        return rank * self.num_layers * (attention + 3 * (h + self.intermediate_size))

    @property
    def num_parameters(self) -> int:
        """Return the number of weights of the whole model, tied embeddings once."""
        h, d = self.hidden_size, self.head_dim
        attention = h * (self.num_heads + 2 * self.num_kv_heads) * d + self.num_heads * d * h
        norms = 2 * h + (2 * d if self.qk_norm else 0)
        layer = attention + 3 * h * self.intermediate_size + norms
        return (1 if self.tied else 2) * self.vocab_size * h + self.num_layers * layer + h

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Return the bytes of one token's keys and values in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype_bytes

    def activation_bytes(self, num_tokens: int, dtype_bytes: int, *, checkpointing: bool) -> int:
        """Return the bytes that the backward pass needs of `num_tokens` at once.

        With checkpointing it needs each layer's input and the whole of one layer, else the whole of all layers.

        A layer keeps, per token: inputs of both norms and of both blocks' projections (4 h), queries, keys, values and
        attention's output (2·heads + 2·kv_heads) d, and gate, up, their activation and product (4 i).
        """
        inner = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim
        layer = 4 * self.hidden_size + inner + 4 * self.intermediate_size
        kept = self.num_layers * self.hidden_size + layer if checkpointing else self.num_layers * layer
        return num_tokens * kept * dtype_bytes


# So that a config can be checked on a machine that does not have the model.
KNOWN_SHAPES: dict[str, ModelShape] = {
    "Qwen3-0.6B": ModelShape(
        hidden_size=1024, num_layers=28, num_heads=16, num_kv_heads=8, head_dim=128, intermediate_size=3072,
        vocab_size=151936, tied=True, qk_norm=True,
    ),
    "Qwen3-8B": ModelShape(
        hidden_size=4096, num_layers=36, num_heads=32, num_kv_heads=8, head_dim=128, intermediate_size=12288,
        vocab_size=151936, tied=False, qk_norm=True,
    ),
    "Qwen3-14B": ModelShape(
        hidden_size=5120, num_layers=40, num_heads=40, num_kv_heads=8, head_dim=128, intermediate_size=17408,
        vocab_size=151936, tied=False, qk_norm=True,
    ),
    "Llama-3.2-3B": ModelShape(
        hidden_size=3072, num_layers=28, num_heads=24, num_kv_heads=8, head_dim=128, intermediate_size=8192,
        vocab_size=128256, tied=True, qk_norm=False,
    ),
}  # fmt: skip


def shape_of(path: str, setting: str) -> ModelShape:
    """Read a model's sizes from its config.json or, when it is not on this machine, from KNOWN_SHAPES by its name.

    Raises ConfigError, which names `setting`.
    """
    file = Path(path) / "config.json"
    if file.is_file():
        content = read_config(path)
        require_plain_decoder(content, f"{setting}={path}")
        return shape_from_json(content, f"{setting}={path}")
    name = Path(path).name.removesuffix("-Instruct").removesuffix("-Base")
    if name not in KNOWN_SHAPES:
        raise ConfigError(f"{setting}={path}: not on this machine, and none of {', '.join(KNOWN_SHAPES)}")
    return KNOWN_SHAPES[name]


def shape_from_json(content: Mapping[str, object], setting: str = "policy.path") -> ModelShape:
    """Read the sizes of a dense decoder. Raises ConfigError, which names `setting` and the entry that is wrong."""

    def size(name: str) -> int:
        value = content.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{setting}: config.json has no {name} (found {value}), so its size cannot be planned")
        return value

    return ModelShape(
        hidden_size=size("hidden_size"),
        num_layers=size("num_hidden_layers"),
        num_heads=size("num_attention_heads"),
        num_kv_heads=size("num_key_value_heads"),
        head_dim=size("head_dim") if content.get("head_dim") else size("hidden_size") // size("num_attention_heads"),
        intermediate_size=size("intermediate_size"),
        vocab_size=size("vocab_size"),
        tied=bool(content.get("tie_word_embeddings")),
        qk_norm=content.get("model_type") == "qwen3",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessPlan:
    """What processes of one kind take."""

    name: str
    count: int
    gpus_each: float
    """GPUs of each; less than 1 is a share of one, 0 is the CPU."""
    parts: Mapping[str, int]
    """Part → bytes that it takes on each GPU of a process, or in its memory where it has none."""

    @property
    def num_bytes(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in self.parts.items())
        where = f"{self.gpus_each:g} GPU" if self.gpus_each else "CPU"
        each = "a GPU" if self.gpus_each > 1 else "each"
        return f"{self.count:>3} × {self.name:<10} {where:<8} {self.num_bytes / GIB:6.1f} GiB {each} ({parts})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What `plan_run` found; prints as a table."""

    config: Config
    """The settings as placed on the machines."""
    num_parameters: int
    """Of the policy."""
    processes: tuple[ProcessPlan, ...]
    nodes: tuple[tuple[str, ...], ...]
    """What runs on each node; empty without GPUs."""
    rollouts_per_update: int
    trajectory_equivalents: float
    """Whole rollouts whose tokens an update costs, a continuation counted as half a one."""
    max_tokens_per_update: int
    max_micro_batches_per_rank: int

    def __str__(self) -> str:
        budget, actors, learner = self.config.budget, self.config.actors, self.config.learner
        lines = [f"policy           {self.num_parameters / 1e6:,.1f} M parameters", "processes"]
        lines += [f"  {process}" for process in self.processes]
        lines += [f"  node {number}: {', '.join(contents) or 'idle'}" for number, contents in enumerate(self.nodes)]
        lines += [
            f"an update        M={budget.root_rollouts} roots + {budget.continuations_per_root}·M continuations = "
            f"{self.rollouts_per_update} rollouts, {self.trajectory_equivalents:g} trajectory equivalents",
            f"                 at most {self.max_tokens_per_update:,} tokens without sharing prefixes, in "
            f"{self.max_micro_batches_per_rank} micro-batches a rank and {learner.minibatches} optimizer steps",
            f"in flight        {actors.num_generators * self.config.engine.max_running_requests} requests at once, "
            f"{actors.num_prompt_actors * actors.prompts_per_actor} prompts hosted, staleness ≤ {actors.max_staleness}",
        ]
        return "\n".join(lines)


def plan_run(config: Config) -> Plan:
    """Work out the plan of a run. Raises ConfigError, naming the setting, when it cannot fit or does not add up."""
    config = place(config, config.actors.num_nodes * (config.actors.gpus_per_node or num_gpus_here()))
    policy = _policy_shape(config)
    processes = (_learner(config, policy), _generator(config, policy), _predictor(config, policy))
    _require_memory(config, processes)
    budget, learner = config.budget, config.learner
    longest = config.sampling.max_context_tokens
    if learner.max_tokens_per_micro_batch < longest:
        raise ConfigError(
            f"learner.max_tokens_per_micro_batch={learner.max_tokens_per_micro_batch}: a trajectory of "
            f"sampling.max_context_tokens={longest} must fit into one micro-batch"
        )
    rollouts = budget.root_rollouts * (1 + budget.continuations_per_root)
    max_tokens = rollouts * longest
    return Plan(
        config=config,
        num_parameters=policy.num_parameters,
        processes=processes,
        nodes=_place(config, processes),
        rollouts_per_update=rollouts,
        trajectory_equivalents=budget.root_rollouts * (1 + budget.continuations_per_root / 2),
        max_tokens_per_update=max_tokens,
        max_micro_batches_per_rank=-(-max_tokens // (learner.max_tokens_per_micro_batch * learner.num_ranks)),
    )


def _policy_shape(config: Config) -> ModelShape:
    policy = config.policy
    if policy.path:
        shape = shape_of(policy.path, "policy.path")
        if (Path(policy.path) / "config.json").is_file():
            require_context(read_config(policy.path), config)
        return shape
    heads = policy.hidden_size // 32
    return ModelShape(
        hidden_size=policy.hidden_size, num_layers=policy.num_layers, num_heads=heads, num_kv_heads=max(1, heads // 2),
        head_dim=32, intermediate_size=3 * policy.hidden_size, vocab_size=512, tied=True, qk_norm=True,
    )  # fmt: skip


def _learner(config: Config, policy: ModelShape) -> ProcessPlan:
    learner, size = config.learner, policy.num_parameters
    width = DTYPE_BYTES[learner.dtype]
    trained = policy.num_adapter_parameters(learner.lora_rank) if learner.lora_rank else size
    optimizer = 12 if learner.dtype == "bfloat16" else 8
    ranks = learner.num_ranks
    share = [1 if learner.zero_stage < stage else ranks for stage in (3, 2, 1)]
    parts = {
        "weights": width * size // share[0],
        "gradients": width * trained // share[1],
        "optimizer": optimizer * trained // share[2],
        "activations": policy.activation_bytes(
            learner.max_tokens_per_micro_batch, width, checkpointing=learner.gradient_checkpointing
        ),
        # Logits and their gradient, in fp32, of one chunk.
        "logits": 8 * policy.vocab_size * min(learner.logprob_chunk_tokens, learner.max_tokens_per_micro_batch),
    }
    if not config.actors.learner_gpus and learner.packing == "tree":
        parts["gathered keys"] = width * _gathered_numbers(config, policy)
    if learner.lora_rank:
        parts["merged weights"] = min(learner.weight_bucket_bytes, width * size)
    if config.loss.kl_loss_coef > 0 and not (config.actors.learner_gpus and learner.reference_device == "cpu"):
        parts["reference"] = width * size // (ranks if learner.reference_is_partitioned else 1)
    parts |= _libraries(config.actors.learner_gpus)
    return ProcessPlan(name="learner", count=ranks, gpus_each=config.actors.learner_gpus, parts=parts)


def _gathered_numbers(config: Config, policy: ModelShape) -> int:
    """Return how many numbers attention on the CPU keeps beside the layers' own: keys and values of whole paths.

    Each segment has those of its whole path. A segment is about a turn, its path half a rollout on average, and every
    query head has a copy of its own. With checkpointing one layer has them at a time.
    """
    learner, sampling = config.learner, config.sampling
    copies = max(1.0, sampling.max_context_tokens / (2 * sampling.max_turn_tokens))
    layers = 1 if learner.gradient_checkpointing else policy.num_layers
    per_layer = 2 * policy.num_heads * policy.head_dim * learner.max_tokens_per_micro_batch
    return int(copies * layers * per_layer)


def _libraries(gpus: float) -> dict[str, int]:
    return {} if gpus else {"libraries": LIBRARIES_BYTES}


def _generator(config: Config, policy: ModelShape) -> ProcessPlan:
    engine, actors = config.engine, config.actors
    width, split = DTYPE_BYTES[engine.dtype], engine.tensor_parallel_size
    if (actors.generator_gpus > 1 or split > 1) and actors.generator_gpus not in (0, split):
        raise ConfigError(
            f"actors.generator_gpus={actors.generator_gpus:g}: must equal engine.tensor_parallel_size={split} "
            "or be a part of one GPU"
        )
    if 0 < engine.kv_cache_tokens < config.sampling.max_context_tokens:
        raise ConfigError(
            f"engine.kv_cache_tokens={engine.kv_cache_tokens}: must hold at least one trajectory of "
            f"sampling.max_context_tokens={config.sampling.max_context_tokens}"
        )
    kv_tokens = engine.kv_cache_tokens
    parts = {"weights": width * policy.num_parameters // split}
    if engine.backend == "torch":
        # It keeps the KV of running requests beside its cache, and has new weights whole before they replace the old.
        kv_tokens += engine.max_running_requests * config.sampling.max_context_tokens
        parts["arriving weights"] = parts["weights"]
    parts["KV"] = kv_tokens * policy.kv_bytes_per_token(width) // split
    parts |= _libraries(actors.generator_gpus)
    return ProcessPlan(name="generator", count=actors.num_generators, gpus_each=actors.generator_gpus, parts=parts)


def _predictor(config: Config, policy: ModelShape) -> ProcessPlan:
    """Plan the predictor: a trunk without a language head, trained in fp32 (trunk=own) or only read (trunk=policy)."""
    predictor = config.predictor
    shape = shape_of(predictor.path, "predictor.path") if predictor.path else policy
    if shape.vocab_size < policy.vocab_size:
        raise ConfigError(
            f"predictor.path={predictor.path}: its vocabulary of {shape.vocab_size} does not hold the policy's "
            f"{policy.vocab_size} token ids; use a model of the policy's family"
        )
    reads = config.predictor_trunk == "policy"
    layers = {predictor.num_layers, predictor.layers_of_prefixes} if reads else {predictor.num_layers}
    num_layers = shape.num_layers if predictor.path or 0 in layers else max(layers)
    shape = replace(shape, num_layers=min(num_layers, shape.num_layers), tied=True)
    # A tree that is larger than the bound is still taken in one piece; one trajectory is the least that can be.
    num_tokens = max(predictor.max_tokens_per_forward, config.sampling.max_context_tokens)
    weights = (
        {"weights": 4 * shape.num_parameters} if reads else {"weights, gradients, Adam": 16 * shape.num_parameters}
    )
    parts = weights | {
        "activations": shape.activation_bytes(num_tokens, 4, checkpointing=reads),
    }
    parts |= _libraries(config.actors.predictor_gpus)
    count = 1 + config.predictor.num_replicas
    return ProcessPlan(name="predictor", count=count, gpus_each=config.actors.predictor_gpus, parts=parts)


def _require_memory(config: Config, processes: tuple[ProcessPlan, ...]) -> None:
    remedies = {
        "learner": "learner.num_ranks or learner.zero_stage up, learner.max_tokens_per_micro_batch down, "
        "learner.gradient_checkpointing=true",
        "generator": "engine.kv_cache_tokens down or engine.tensor_parallel_size up",
        "predictor": "a smaller predictor.path, or predictor.max_tokens_per_forward down",
    }
    for process in processes:
        available = config.actors.gpu_memory_gib * min(1.0, process.gpus_each) - RESERVE_GIB
        if process.gpus_each and process.num_bytes / GIB > available:
            raise ConfigError(
                f"actors.gpu_memory_gib={config.actors.gpu_memory_gib:g}: each {process.name} needs about "
                f"{process.num_bytes / GIB:.0f} GiB a GPU, {available:.0f} are left beside a reserve of "
                f"{RESERVE_GIB:g}; try {remedies[process.name]}"
            )


def _place(config: Config, processes: tuple[ProcessPlan, ...]) -> tuple[tuple[str, ...], ...]:
    """Return what runs on each node: first fit, largest first, all GPUs of a process on one node.

    Raises ConfigError when the nodes do not suffice.
    """
    actors = config.actors
    wanted = sorted((p for p in processes if p.gpus_each), key=lambda p: -p.gpus_each)
    if not wanted:
        return ()
    per_node = actors.gpus_per_node or num_gpus_here()
    free = [float(per_node)] * actors.num_nodes
    placed: list[dict[str, int]] = [{} for _ in free]
    for process in wanted:
        for _ in range(process.count):
            node = next((i for i, left in enumerate(free) if left >= process.gpus_each), None)
            if node is None:
                total = sum(p.count * p.gpus_each for p in wanted)
                raise ConfigError(
                    f"actors.num_nodes={actors.num_nodes}: {total:g} GPUs are asked for ({_asked(wanted)}), and "
                    f"{actors.num_nodes} × actors.gpus_per_node={per_node} cannot hold them"
                )
            free[node] -= process.gpus_each
            placed[node][process.name] = placed[node].get(process.name, 0) + 1
    return tuple(tuple(f"{count} × {name}" for name, count in node.items()) for node in placed)


def _asked(processes: list[ProcessPlan]) -> str:
    return ", ".join(f"{p.count} {p.name} of {p.gpus_each:g}" for p in processes)
