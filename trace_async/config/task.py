"""What is trained on what: the environment, the start policy and how rollouts are sampled."""

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field

from trace_async.config.section import require, section

Dtype = Literal["float32", "bfloat16"]
Device = Literal["auto", "cpu", "cuda"]

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


@section("env")
class EnvConfig:
    """The environment that the policy acts in."""

    name: Annotated[str, Field(min_length=1)] = "multihop"
    """A built-in domain (`multihop`, `math`, `functions`, `mixed`, `qa_files`, `math_files`, `bfcl`), or
    `package.module:Class` of your own; `trace-async env check NAME` tries one."""
    args: dict[str, Any] = field(default_factory=dict)
    """What the domain's constructor is called with. The domain's own documentation names them (docs/domains.md)."""
    init_timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """Seconds that `make_env` and `init` may take, each. What does not end is cancelled and tried again, then counted
    as lost; the other rollouts go on. So it is with the three limits below."""
    step_timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """Seconds that one `step` may take, the verifier included."""
    fork_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """Seconds that one `fork` may take."""
    close_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """Seconds that one `close` may take. A rollout whose environment does not close keeps its reward."""
    blocking: bool = False
    """Run each method of the environment in a thread of its own: for tools that wait without `await` (`time.sleep`,
    `requests`), which would hold up every other prompt. A domain may ask for it with an attribute `blocking = True`.
    Environments with `blocking = False`, such as `agent` and `mcp`, stay in the event loop that holds their
    connections; what blocks in them has threads of its own."""
    reward_range: Annotated[tuple[float, ...], Field(min_length=2, max_length=2)] = (0.0, 1.0)
    """Lowest and highest reward of the verifier, mapped to 0 and 1, such as [-1, 1] or [0, 100]."""

    def __post_init__(self) -> None:
        low, high = self.reward_range
        require(low < high, "env.reward_range", self.reward_range, "the lowest reward, then the highest")


@section("policy")
class PolicyConfig:
    """The policy that training starts from."""

    path: str = ""
    """A local Hugging Face directory of a causal language model with tokenizer and chat template. Empty: a small Qwen3
    is built for the environment from its demonstrations (`trace-async make-policy`)."""
    cache_dir: Annotated[str, Field(min_length=1)] = ".cache/policies"
    """Where policies built for an environment are kept."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the small policy that is built when `path` is empty."""
    dtype: Dtype = "float32"
    """Number format in which the policy is loaded from disk."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables for the chat template, for example {enable_thinking: false} with Qwen3."""
    hidden_size: Annotated[int, Field(ge=32, multiple_of=32)] = 128
    """Width of the small policy that is built when `path` is empty."""
    num_layers: Annotated[int, Field(ge=1)] = 3
    """Layers of the small policy that is built when `path` is empty."""
    warm_start_steps: Annotated[int, Field(ge=1)] = 300
    """Steps of supervised learning on demonstrations with which the small policy is built."""

    def __post_init__(self) -> None:
        for name, value in self.chat_template_kwargs.items():
            setting = f"policy.chat_template_kwargs.{name}"
            require(name not in TEMPLATE_ARGUMENTS, setting, value, "is set by the trainer")


@section("cold_start")
class ColdStartConfig:
    """Supervised fine-tuning of `policy.path` before training, by `trace-async make-policy`; nothing else reads it."""

    chats: str = ""
    """A JSONL file of your own demonstrations, each line `{"messages": [{"role": …, "content": …}, …]}`. Empty: the
    environment's own."""
    num_demonstrations: Annotated[int, Field(ge=2)] = 512
    """Demonstrations that are made or read, those held out included."""
    num_epochs: Annotated[int, Field(ge=1)] = 1
    """Times that each demonstration is trained on."""
    heldout_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the demonstrations that only measure the loss."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Peak learning rate of AdamW: up over the first twentieth of the steps, down from the middle on."""
    lora_rank: Annotated[int, Field(ge=0, le=512)] = 0
    """Rank of LoRA adapters, merged into the weights at the end. 0: the weights themselves are trained."""
    num_layers: Annotated[int, Field(ge=0)] = 0
    """Only so many of the upper layers are trained, which saves the backward pass of the others. 0: all layers."""
    tokens_per_step: Annotated[int, Field(ge=1)] = 2048
    """Tokens of the packed row of one optimizer step; a longer demonstration goes alone."""
    evaluate_every_steps: Annotated[int, Field(ge=1)] = 10
    """Steps between two measurements of the held-out loss."""
    patience: Annotated[int, Field(ge=1)] = 2
    """Measurements in a row without a lower held-out loss after which it stops; the best weights are kept."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the demonstrations, their order, what is held out and the adapters."""

    def __post_init__(self) -> None:
        require(
            not (self.lora_rank and self.num_layers),
            "cold_start.num_layers",
            self.num_layers,
            f"adapters are on every layer: 0, or cold_start.lora_rank=0 instead of {self.lora_rank}",
        )


@section("sampling")
class SamplingConfig:
    """How rollouts are sampled. A rollout whose context is full ends with reward 0: that is the policy's own doing."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature in training, where 0 (greedy) would leave nothing to compare. Evaluations have their own."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling: only the likeliest tokens that together have this probability. 1: all."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Only so many of the likeliest tokens are sampled from. 0: all."""
    max_turn_tokens: Annotated[int, Field(ge=1)] = 24
    """Tokens that the policy may write in one turn (alias max_new_tokens, max_response_length of a turn)."""
    max_context_tokens: Annotated[int, Field(ge=2)] = 512
    """Tokens of a whole rollout, prompt and observations included (alias max_model_len)."""
    max_observation_tokens: Literal[0] | Annotated[int, Field(ge=16)] = 512
    """Tokens of every message that an environment answers with; what is longer is cut and ends with `[ cut ]`. 0: no
    limit. Environments cut by characters before that, at a limit of their own."""

    def __post_init__(self) -> None:
        require(
            self.max_context_tokens > self.max_turn_tokens,
            "sampling.max_context_tokens",
            self.max_context_tokens,
            f"must be greater than sampling.max_turn_tokens={self.max_turn_tokens}",
        )
