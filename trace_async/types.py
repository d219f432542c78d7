"""Define the small frozen records that every part passes around.

They are the project's common vocabulary, so this module imports nothing of ours.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, TypeAlias

Role = Literal["system", "user", "assistant", "tool"]
Split = Literal["train", "heldout"]
FinishReason = Literal["stop", "length", "abort"]

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"


class LossKind(StrEnum):
    """Every way in which a rollout is lost through no fault of the policy, as the ledger and the figures name it.

    A new way gets a member here, and the error that reports it names it as its `loss`.
    """

    ENGINE = "engine_error"
    """An engine could not do what was asked, and said no more."""
    ENGINE_REFUSED = "engine_refused"
    """The request itself was wrong, for example too long for the engine's context."""
    ENGINE_DIED = "engine_died"
    """The engine's process or its connection was gone, on every generator that was tried."""
    ENGINE_TIMEOUT = "engine_timeout"
    """No completion within `engine.request_timeout_s` of the engine's own work."""
    ENV = "env_error"
    """The environment's own code, a tool or the verifier broke down."""
    ENV_TIMEOUT = "env_timeout"
    """A method of the environment did not end within its limit (`env.step_timeout_s` and the like)."""
    ENV_VALUE = "env_value"
    """The environment gave something without a plain meaning, such as a reward that is no finite number."""
    PROMPT_TOO_LONG = "prompt_too_long"
    """The task's prompt leaves no room in `sampling.max_context_tokens`."""
    REPLAY_DIVERGED = "replay_diverged"
    """A fork by replay did not come back to the state that it was made from."""
    TREE_TIMEOUT = "tree_timeout"
    """The whole prompt outran `actors.tree_timeout_s`, counted from when it was served."""
    PROMPT_ACTOR_DIED = "prompt_actor_died"
    """The process that grew the prompt died, more often than `actors.max_rollout_retries` allows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One chat message."""

    role: Role
    content: str
    """The text. It is data: the renderer never lets it become control tokens."""
    token_ids: tuple[int, ...] | None = None
    """The tokens in which the policy wrote the content, when an environment repeats it in another conversation.
    The renderer then uses these tokens and does not tokenise the content again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What a rollout starts from."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Json], ...] = ()
    """JSON schemas of the tools, for chat templates that show tools to the policy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One row of a data set: a problem to solve and what its verifier needs."""

    id: str
    domain: str
    kind: str
    """The group of the task in reports: `level` or `level-detail`, such as "middle-3hop". The method never reads it."""
    data: Mapping[str, Json]
    """Whatever the environment needs to pose the task and to verify an answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What an environment answers to one turn of the policy.

    A rollout may hold several conversations, for example when an agent rewrites its history or hands work to another
    agent. `after` and `prompt` say where the next turn belongs; most environments need neither.
    """

    messages: tuple[Message, ...] = ()
    """The observation; empty when `done`."""
    after: int | None = None
    """The turn that `messages` follow, counted from 0 within the rollout (None: the last turn)."""
    prompt: Prompt | None = None
    """Given in place of `messages` when the next turn begins a new conversation."""
    done: bool = False
    reward: float | None = None
    """The verifier's reward in [0, 1]; given exactly when `done`."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Further numbers about a finished rollout, such as token F1."""

    def __post_init__(self) -> None:
        if self.done != (self.reward is not None):
            raise ValueError("StepResult: a reward is given exactly when done")
        if self.done == bool(self.messages or self.prompt):
            raise ValueError("StepResult: an observation is given exactly when not done")
        if self.prompt is not None and (self.messages or self.after is not None):
            raise ValueError("StepResult: a prompt begins a conversation, so it follows no turn")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How an engine samples a turn."""

    temperature: float = 1.0
    """0 samples greedily."""
    top_p: float = 1.0
    top_k: int = 0
    """0 does not limit the candidates."""
    max_new_tokens: int = 64
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    """Strings that end the turn. Their tokens remain part of the turn."""
    read_layers: int | None = None
    """Return the policy's hidden state at the end of the prompt, taken after this many layers (0: after all layers;
    None: return no state). An engine that cannot read hidden states leaves it out."""
    read_tokens: int = 10
    """Average the hidden state over this many tokens at the end of the prompt."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must be ≥ 0, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be ≥ 0 (0: off), not {self.top_k}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be ≥ 1, not {self.max_new_tokens}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnLimits:
    """Limits that an environment sets for the policy's next turn, within those of the run's settings."""

    max_new_tokens: int | None = None
    """The most tokens of the turn. It can only lower the run's own limit (None: the run's limit holds)."""
    stop: tuple[str, ...] = ()
    """Strings that end the turn."""


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Which version of the policy wrote a run of generated tokens.

    New weights can arrive while a turn is generated, so one turn may have several spans. A span ends where the next
    one starts, and the last one ends with the turn.
    """

    start: int
    """Index of the first token of the span among the generated tokens."""
    policy_version: int


@dataclass(frozen=True, slots=True)
class HiddenState:
    """The policy's hidden state at the end of a history; the predictor reads it."""

    policy_version: int
    """The version of the policy that computed it."""
    num_tokens: int
    """It is the mean over this many tokens at the end of the history."""
    values: bytes
    """float32 numbers [hidden size], as raw bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What an engine generated for one prompt."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """`logprobs[i]` is log p(token_ids[i]) under the weights that wrote the token. The distribution is scaled by the
    sampling temperature; at temperature 0 (greedy) it is not scaled."""
    version_spans: tuple[VersionSpan, ...]
    """The policy versions that wrote the tokens. The first span starts at token 0."""
    finish_reason: FinishReason
    prompt_tokens: int
    """Number of tokens of the prompt."""
    cached_tokens: int
    """How many of the `prompt_tokens` the engine took from its KV cache."""
    prompt_state: HiddenState | None = None
    """The hidden state at the end of the prompt, if it was asked for and the engine can read it. Only tokens that were
    not cached enter it, because the others are not computed again."""

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.logprobs):
            raise ValueError(f"{len(self.token_ids)} tokens but {len(self.logprobs)} log-probabilities")
        if self.token_ids and (not self.version_spans or self.version_spans[0].start != 0):
            raise ValueError("version_spans must start at token 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyTurn:
    """One turn of the policy in full, for environments that need more than its text."""

    text: str
    """The decoded turn, without the token that ends it."""
    truncated: bool
    """Whether the turn stopped without the token that ends a turn."""
    completion: Completion
    decode: Callable[[Sequence[int]], str]
    """Turns any token ids into text."""
    message: Mapping[str, Json] | None = None
    """The turn as a chat message, parsed by the tokenizer's response template (None: the tokenizer has no such
    template, or the turn does not fit it)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixQuery:
    """A question to the predictor: V(H) at several positions of one history.

    The positions are the ends of the last turns. A prompt that has no turn yet has one position, its end.
    """

    token_ids: tuple[int, ...]
    positions: tuple[int, ...]
    """V is wanted after the first `positions[k]` tokens, for each k; ascending, each in 1..len(token_ids)."""
    turn_logprobs: tuple[tuple[float, ...], ...] = ()
    """For every turn of the history, the log-probabilities of its generated tokens."""
    states: tuple[HiddenState, ...] = ()
    """The policy's hidden state at every position; empty if the engine did not give them."""
    prompt_value: float | None = None
    """What Stage 1 believed of the prompt, its earlier rollouts included, when it bought this one (None: nothing)."""


@dataclass(frozen=True, slots=True)
class Point:
    """The metrics of one step."""

    step: int
    time: float
    """Unix seconds."""
    metrics: Mapping[str, float]
