"""Every setting, with its default, its meaning and its limits; `load_config` is the only reader of YAML.

A YAML file holds only what differs from the defaults; overrides are `section.name=value`. From `load_config` on there
are plain frozen dataclasses. Aliases of other trainers are named where they help.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from yaml import YAMLError

EngineBackend = Literal["torch", "sglang", "vllm", "fake"]
Stage1Rule = Literal["uniform", "point", "beta", "thompson", "pcl", "vip", "dapo"]
Stage2Rule = Literal["none", "random", "contrast", "contrast_per_token", "contrast_value_only"]
AdvantageName = Literal["trace", "tree_grpo", "tree_rpo", "treepo", "grpo"]


# What `apply_chat_template` is given by the renderer, or what would change the kind of its answer.
TEMPLATE_ARGUMENTS = (
    "conversation",
    "messages",
    "tools",
    "documents",
    "chat_template",
    "tokenize",
    "add_generation_prompt",
    "continue_final_message",
    "return_dict",
    "return_tensors",
)


class ConfigError(ValueError):
    """A setting is unknown, ill-typed or impossible; the message names it and says what to do."""


def _require(condition: bool, setting: str, found: object, rule: str) -> None:
    if not condition:
        raise ConfigError(f"{setting}={found}: {rule}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvConfig:
    """`name`: a built-in domain (multihop, math, functions, mixed) or `package.module:Class` of your own.

    `args` are handed to its constructor.
    """

    name: str = "multihop"
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyConfig:
    """`path`: a local Hugging Face causal LM directory with tokenizer and chat template.

    Empty: `make-policy` builds a small Qwen3 for the environment and caches it under `cache_dir`, from `seed`.
    `chat_template_kwargs`: variables for the chat template, for example {enable_thinking: false} with Qwen3.
    """

    path: str = ""
    cache_dir: str = ".cache/policies"
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    hidden_size: int = 128
    num_layers: int = 3
    warm_start_steps: int = 300

    def __post_init__(self) -> None:
        _require(self.hidden_size % 32 == 0, "policy.hidden_size", self.hidden_size, "must be a multiple of 32")
        _require(self.num_layers >= 1, "policy.num_layers", self.num_layers, "must be ≥ 1")
        _require(self.warm_start_steps >= 1, "policy.warm_start_steps", self.warm_start_steps, "must be ≥ 1")
        for name in self.chat_template_kwargs:
            setting = f"policy.chat_template_kwargs.{name}"
            _require(name not in TEMPLATE_ARGUMENTS, setting, self.chat_template_kwargs[name], "is set by the trainer")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """How rollouts are sampled. A rollout whose context is full ends with reward 0 (the policy's own doing).

    `max_observation_tokens` (0: no limit): of every message that an environment answers with, whatever the domain; what
    is longer is cut and ends with `[ cut ]`. Environments cut by characters before that, at a limit of their own.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_turn_tokens: int = 24
    max_context_tokens: int = 512
    max_observation_tokens: int = 512

    def __post_init__(self) -> None:
        _require(self.temperature > 0, "sampling.temperature", self.temperature, "must be > 0 in training")
        _require(0 < self.top_p <= 1, "sampling.top_p", self.top_p, "must be in (0, 1]")
        _require(self.max_turn_tokens >= 1, "sampling.max_turn_tokens", self.max_turn_tokens, "must be ≥ 1")
        _require(
            self.max_context_tokens > self.max_turn_tokens,
            "sampling.max_context_tokens",
            self.max_context_tokens,
            f"must be greater than sampling.max_turn_tokens={self.max_turn_tokens}",
        )
        _require(
            self.max_observation_tokens == 0 or self.max_observation_tokens >= 16,
            "sampling.max_observation_tokens",
            self.max_observation_tokens,
            "0 (no limit) or ≥ 16",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetConfig:
    """The sampling budget of one update and how it is spent (METHOD: M, N, pool).

    A round spends `root_rollouts` (M) over a pool of `pool_size` candidate prompts and, inside each prompt with m
    root rollouts, `continuations_per_root`·m continuations (N); cost in trajectory equivalents M·(1 + N/2).
    `stage1`: uniform (every prompt gets `uniform_rollouts`, alias n, group size, num_generations) | point | beta
    (posterior) | thompson (MoPPS) | pcl | vip | dapo. `stage2`: none | random | contrast | contrast_per_token |
    contrast_value_only. `stage2_rounds`: the continuations of a prompt are spent in this many rounds (Tree-GRPO's L).
    `explore_share`: of the root rollouts (point, beta), goes to pairs on candidates drawn at random, whatever is
    believed of them: what the policy forgets is seen only so. `warmup_rounds`: first rounds with stage1=uniform in
    groups of `warmup_rollouts` (small groups show the predictor more prompts); charged like all others.
    `oracle_rollouts`: for understanding only; where rules ask for V, so many rollouts of the current policy from each
    prompt and prefix measure it, uncharged, in place of the predictor.
    """

    root_rollouts: int = 64
    continuations_per_root: int = 2
    pool_size: int = 192
    min_rollouts: int = 0
    max_rollouts: int = 8
    uniform_rollouts: int = 8
    max_per_prefix: int | None = None
    stage1: Stage1Rule = "beta"
    stage2: Stage2Rule = "contrast"
    stage2_rounds: int = 1
    warmup_rounds: int = 2
    warmup_rollouts: int = 2
    oracle_rollouts: int = 0
    explore_share: float = 0.0

    def __post_init__(self) -> None:
        _require(self.root_rollouts >= 2, "budget.root_rollouts", self.root_rollouts, "must be ≥ 2")
        _require(self.continuations_per_root >= 0, "budget.continuations_per_root", self.continuations_per_root, "≥ 0")
        _require(self.pool_size >= 1, "budget.pool_size", self.pool_size, "must be ≥ 1")
        _require(self.max_rollouts >= 2, "budget.max_rollouts", self.max_rollouts, "one rollout cannot disagree; ≥ 2")
        _require(
            0 <= self.min_rollouts <= self.max_rollouts, "budget.min_rollouts", self.min_rollouts, "≤ max_rollouts"
        )
        _require(self.uniform_rollouts >= 2, "budget.uniform_rollouts", self.uniform_rollouts, "must be ≥ 2")
        _require(self.stage2_rounds >= 1, "budget.stage2_rounds", self.stage2_rounds, "must be ≥ 1")
        _require(self.warmup_rollouts >= 2, "budget.warmup_rollouts", self.warmup_rollouts, "must be ≥ 2")
        _require(self.warmup_rounds >= 0, "budget.warmup_rounds", self.warmup_rounds, "must be ≥ 0")
        _require(0 <= self.explore_share <= 1, "budget.explore_share", self.explore_share, "between 0 and 1")
        _require(self.oracle_rollouts >= 0, "budget.oracle_rollouts", self.oracle_rollouts, "must be ≥ 0")
        _require(
            self.pool_size * self.min_rollouts <= self.root_rollouts,
            "budget.min_rollouts",
            self.min_rollouts,
            f"pool_size·min_rollouts must not exceed root_rollouts={self.root_rollouts}",
        )
        _require(
            self.pool_size * self.max_rollouts >= self.root_rollouts,
            "budget.pool_size",
            self.pool_size,
            f"pool_size·max_rollouts must reach root_rollouts={self.root_rollouts}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictorConfig:
    """The value model that estimates V(H); it steers the allocation and never enters the policy's gradient.

    `path`: Hugging Face directory to start from; empty: the start policy's own weights, of which the first `num_layers`
    layers (0: all). Its head learns `head_lr_scale` times as fast as the rest. `loss`: mse (the paper's) | bce.
    `replay_trees`: the last finished trees it is trained on, per update in `steps_per_update` steps of
    `trees_per_step` whole trees (0: it never learns), then in `prompt_steps_per_update` cheap steps on prompts alone,
    `prompt_tokens_per_step` tokens of them; the first update has `warmup_steps` more of those, each that follows half
    as many. `max_tokens_per_forward` bounds its memory.
    `prior_strength`: how many pseudo rollouts its estimate is worth beside a prompt's own counts; with
    `fit_prior_strength` only at first, then fitted to what came out. A prompt's counts lose half their weight every
    `count_half_life` policy versions (0: never).
    """

    path: str = ""
    num_layers: int = 2
    learning_rate: float = 1e-3
    head_lr_scale: float = 1.0
    weight_decay: float = 0.01
    loss: Literal["mse", "bce"] = "bce"
    prompt_steps_per_update: int = 2
    warmup_steps: int = 16
    prompt_tokens_per_step: int = 1024
    steps_per_update: int = 2
    trees_per_step: int = 8
    max_tokens_per_forward: int = 8192
    replay_trees: int = 512
    prior_strength: float = 4.0
    fit_prior_strength: bool = True
    count_half_life: float = 8.0
    num_threads: int = 1

    def __post_init__(self) -> None:
        _require(self.num_layers >= 0, "predictor.num_layers", self.num_layers, "must be ≥ 0 (0: all)")
        _require(self.learning_rate > 0, "predictor.learning_rate", self.learning_rate, "must be > 0")
        _require(self.head_lr_scale > 0, "predictor.head_lr_scale", self.head_lr_scale, "must be > 0")
        _require(self.weight_decay >= 0, "predictor.weight_decay", self.weight_decay, "must be ≥ 0")
        _require(self.steps_per_update >= 0, "predictor.steps_per_update", self.steps_per_update, "must be ≥ 0")
        _require(
            self.prompt_steps_per_update >= 0,
            "predictor.prompt_steps_per_update",
            self.prompt_steps_per_update,
            "must be ≥ 0",
        )
        _require(self.warmup_steps >= 0, "predictor.warmup_steps", self.warmup_steps, "must be ≥ 0")
        _require(
            self.prompt_tokens_per_step >= 1,
            "predictor.prompt_tokens_per_step",
            self.prompt_tokens_per_step,
            "must be ≥ 1",
        )
        _require(self.trees_per_step >= 1, "predictor.trees_per_step", self.trees_per_step, "must be ≥ 1")
        _require(
            self.max_tokens_per_forward >= 1,
            "predictor.max_tokens_per_forward",
            self.max_tokens_per_forward,
            "must be ≥ 1",
        )
        _require(self.replay_trees >= 1, "predictor.replay_trees", self.replay_trees, "must be ≥ 1")
        _require(self.prior_strength > 0, "predictor.prior_strength", self.prior_strength, "must be > 0")
        _require(self.count_half_life >= 0, "predictor.count_half_life", self.count_half_life, "must be ≥ 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfig:
    """The policy-gradient loss. Clipping is on the ratio learner / generator at the sampling temperature.

    `eps_clip_low`, `eps_clip_high` (aliases clip_ratio_low/high, epsilon); `dual_clip` 0: off (usual: 3);
    `kl_loss_coef` with `kl_estimator` k1 | k2 | k3 to the start policy; `correction`: none | decoupled (AReaL,
    arXiv 2505.24298) | tis (truncated importance weight at `tis_cap`); `aggregation`: token | sequence | prompt.
    """

    advantage: AdvantageName = "trace"
    normalize_std: bool = False
    eps_clip_low: float = 0.2
    eps_clip_high: float = 0.28
    dual_clip: float = 0.0
    kl_loss_coef: float = 0.0
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    entropy_coef: float = 0.0
    correction: Literal["none", "decoupled", "tis"] = "none"
    tis_cap: float = 2.0
    aggregation: Literal["token", "sequence", "prompt"] = "prompt"

    def __post_init__(self) -> None:
        _require(0 < self.eps_clip_low <= 1, "loss.eps_clip_low", self.eps_clip_low, "must be in (0, 1]")
        _require(self.eps_clip_high > 0, "loss.eps_clip_high", self.eps_clip_high, "must be > 0")
        _require(self.dual_clip == 0 or self.dual_clip > 1, "loss.dual_clip", self.dual_clip, "0 (off) or > 1")
        _require(self.kl_loss_coef >= 0, "loss.kl_loss_coef", self.kl_loss_coef, "must be ≥ 0")
        _require(self.tis_cap >= 1, "loss.tis_cap", self.tis_cap, "must be ≥ 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerConfig:
    """The DeepSpeed ranks. `packing`: tree (shared prefixes once) | flat (reference).

    `minibatches`: optimizer steps per update (alias ppo mini-batches). `deepspeed`: any DeepSpeed option, handed on
    as it is. `gradient_checkpointing` and `logprob_chunk_tokens` bound memory. `num_threads`: per rank, on the CPU.
    `reference_device`: of the frozen start policy that loss.kl_loss_coef holds to, loaded only when that is > 0 (auto:
    the learner's, partitioned under ZeRO-3 as the policy is; cpu leaves the GPU's memory to the policy).
    `weight_bucket_bytes`: how much of the weights is whole on a rank at a time (one tensor at least) on its way to the
    generators.
    """

    num_ranks: int = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    zero_stage: Literal[0, 1, 2, 3] = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    learning_rate: float = 5e-4
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    lr_warmup_updates: int = 0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    minibatches: int = 1
    packing: Literal["tree", "flat"] = "tree"
    max_tokens_per_micro_batch: int = 8192
    logprob_chunk_tokens: int = 4096
    gradient_checkpointing: bool = False
    lora_rank: int = 0
    reference_device: Literal["auto", "cpu", "cuda"] = "auto"
    weight_bucket_bytes: int = 256 * 1024**2
    deepspeed: dict[str, Any] = field(default_factory=dict)
    num_threads: int = 1
    step_timeout_s: float = 600.0

    def __post_init__(self) -> None:
        _require(self.num_ranks >= 1, "learner.num_ranks", self.num_ranks, "must be ≥ 1")
        _require(self.learning_rate > 0, "learner.learning_rate", self.learning_rate, "must be > 0")
        _require(self.minibatches >= 1, "learner.minibatches", self.minibatches, "must be ≥ 1")
        _require(self.max_tokens_per_micro_batch >= 1, "learner.max_tokens_per_micro_batch", 0, "must be ≥ 1")
        _require(self.lora_rank >= 0, "learner.lora_rank", self.lora_rank, "0 (off) or the rank")
        _require(self.weight_bucket_bytes >= 1, "learner.weight_bucket_bytes", self.weight_bucket_bytes, "must be ≥ 1")

    @property
    def reference_is_partitioned(self) -> bool:
        """Over the ranks, as ZeRO-3 does with the policy; on a device of its own every rank holds it whole."""
        return self.zero_stage == 3 and self.reference_device == "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """The inference engine of each generator (alias rollout engine). `torch` is embedded; the others are servers.

    `python`: interpreter of the engine's own environment (empty: found under `.venvs/<backend>`). `url`: attach to a
    running server instead of starting one. `server_args`: more flags for the server, handed on as they are.
    `kv_cache_tokens` 0: with a server as many as its GPU has room for. `weight_sync`, how new weights reach a server:
    memory (a file in shared memory) | disk | collective (broadcast). `lora_rank`: 0, merged weights are sent; or
    learner.lora_rank, then only the adapter is, for the server to add (vllm).
    """

    backend: EngineBackend = "torch"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    tensor_parallel_size: int = 1
    max_running_requests: int = 64
    kv_cache_tokens: int = 65536
    prefix_cache: bool = True
    python: str = ""
    url: str = ""
    server_args: dict[str, Any] = field(default_factory=dict)
    weight_sync: Literal["memory", "disk", "collective"] = "memory"
    lora_rank: int = 0
    start_timeout_s: float = 300.0
    request_timeout_s: float = 120.0
    num_threads: int = 1

    def __post_init__(self) -> None:
        _require(self.tensor_parallel_size >= 1, "engine.tensor_parallel_size", self.tensor_parallel_size, "≥ 1")
        _require(
            self.backend != "torch" or self.tensor_parallel_size == 1,
            "engine.tensor_parallel_size",
            self.tensor_parallel_size,
            "the torch engine does not split a model: 1, or engine.backend=sglang or vllm",
        )
        _require(self.max_running_requests >= 1, "engine.max_running_requests", self.max_running_requests, "≥ 1")
        _require(self.request_timeout_s > 0, "engine.request_timeout_s", self.request_timeout_s, "must be > 0")
        _require(0 <= self.lora_rank <= 512, "engine.lora_rank", self.lora_rank, "0 (merged weights) to 512")
        merged = "; or engine.lora_rank=0, for merged weights"
        if self.lora_rank:
            _require(self.backend == "vllm", "engine.backend", self.backend, "only vllm takes LoRA adapters" + merged)
            _require(self.weight_sync != "collective", "engine.weight_sync", "collective", "not of adapters" + merged)
            _require(not self.url, "engine.url", self.url, "adapters need a server that is started for them" + merged)


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorsConfig:
    """Ray actors. `max_staleness`: weight versions a tree may lag at training; 0 is the synchronous trainer.

    `prompts_per_actor`: how many prompts one PromptActor process hosts at a time (1: a process per prompt).
    `spill_requests`: requests beyond which a generator counts as overloaded and a prompt spills to another.
    `num_nodes`, `gpus_per_node`, `gpu_memory_gib`: the cluster that `--dry-run` plans for; nothing else reads them.
    """

    num_generators: int = 1
    num_prompt_actors: int = 1
    prompts_per_actor: int = 256
    max_staleness: int = 1
    spill_requests: int = 96
    max_rollout_retries: int = 2
    tree_timeout_s: float = 600.0
    ray_address: str = ""
    generator_cpus: float = 1.0
    generator_gpus: float = 0.0
    learner_gpus: float = 0.0
    predictor_gpus: float = 0.0
    num_nodes: int = 1
    gpus_per_node: int = 8
    gpu_memory_gib: float = 80.0

    def __post_init__(self) -> None:
        _require(self.num_generators >= 1, "actors.num_generators", self.num_generators, "must be ≥ 1")
        _require(self.num_prompt_actors >= 1, "actors.num_prompt_actors", self.num_prompt_actors, "must be ≥ 1")
        _require(self.prompts_per_actor >= 1, "actors.prompts_per_actor", self.prompts_per_actor, "must be ≥ 1")
        _require(self.num_nodes >= 1, "actors.num_nodes", self.num_nodes, "must be ≥ 1")
        _require(self.gpus_per_node >= 1, "actors.gpus_per_node", self.gpus_per_node, "must be ≥ 1")
        _require(self.max_staleness >= 0, "actors.max_staleness", self.max_staleness, "≥ 0 (0: synchronous)")
        _require(self.max_rollout_retries >= 0, "actors.max_rollout_retries", self.max_rollout_retries, "≥ 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """Held-out evaluation: `num_tasks` tasks every `every_updates` updates (0: only before and after)."""

    num_tasks: int = 600
    every_updates: int = 0
    temperatures: tuple[float, ...] = (1.0, 0.0)

    def __post_init__(self) -> None:
        _require(self.num_tasks >= 1, "eval.num_tasks", self.num_tasks, "must be ≥ 1")
        _require(bool(self.temperatures), "eval.temperatures", self.temperatures, "name at least one (0: greedy)")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackingConfig:
    """MLflow. `uri` empty: a sqlite store under the run's output root."""

    uri: str = ""
    experiment: str = "trace_async"
    system_metrics: bool = True
    trees_per_artifact: int = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """`every_updates` 0: only at the end. `keep`: the newest so many are kept."""

    every_updates: int = 10
    keep: int = 2

    def __post_init__(self) -> None:
        _require(self.every_updates >= 0, "checkpoint.every_updates", self.every_updates, "must be ≥ 0")
        _require(self.keep >= 1, "checkpoint.keep", self.keep, "must be ≥ 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A run. It ends after `num_updates` updates or, when > 0, `max_generated_tokens` generated tokens."""

    name: str = "run"
    seed: int = 0
    output_dir: str = "runs"
    num_updates: int = 40
    max_generated_tokens: int = 0
    env: EnvConfig = field(default_factory=EnvConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    actors: ActorsConfig = field(default_factory=ActorsConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        _require(self.num_updates >= 1, "num_updates", self.num_updates, "must be ≥ 1")
        _require(bool(self.name) and "/" not in self.name, "name", self.name, "a plain name without '/'")
        _require(
            self.engine.lora_rank in (0, self.learner.lora_rank),
            "engine.lora_rank",
            self.engine.lora_rank,
            f"0 (merged weights) or that of the learner, learner.lora_rank={self.learner.lora_rank}",
        )


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """The defaults, then the YAML file, then `section.name=value` overrides, checked. Raises ConfigError."""
    if path is None:
        return config_from_yaml("", overrides)
    if not Path(path).is_file():
        raise ConfigError(f"config file {path} does not exist")
    try:
        return config_from_yaml(Path(path).read_text(encoding="utf-8"), overrides)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def config_from_yaml(text: str, overrides: Sequence[str] = ()) -> Config:
    """As `load_config`, from the file's text."""
    # Here, so that what needs no file runs where only torch is, as on a machine that a benchmark has borrowed.
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        own = OmegaConf.create(text), OmegaConf.from_dotlist(list(overrides))
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), *own))
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(str(error).strip()) from error
    assert isinstance(config, Config)
    return config


def config_to_dict(config: Config) -> dict[str, Any]:
    """Nested plain values, for YAML and MLflow."""
    return asdict(config)


def config_to_yaml(config: Config) -> str:
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(config_to_dict(config)))
