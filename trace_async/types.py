"""The carriers: small frozen records that every part passes around. Imports nothing of ours."""

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
    """One chat message. `content` is data: the renderer never lets it become control tokens.

    `token_ids`: the content in the tokens that the policy wrote it in, where an environment repeats it in a
    conversation of its own; then these are used, and the content is not tokenised again.
    """

    role: Role
    content: str
    token_ids: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What a rollout starts from: messages, and tool schemas for chat templates that know tools."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Json], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One row of a data set: a prompt to be solved and what its verifier needs.

    `kind` groups tasks in reports, as `level` or `level-detail` (such as "middle-3hop"); the method never looks at it.
    """

    id: str
    domain: str
    kind: str
    data: Mapping[str, Json]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What an environment answers to one turn.

    `messages`: the observation (empty when `done`). `reward`: in [0, 1], given by the verifier, exactly when `done`.
    `metrics`: further numbers of a finished rollout, such as token F1.

    A rollout may hold several conversations (an agent that rewrites its history, or has others work for it): `after`:
    the messages follow this turn of the rollout, counted from 0, and not the last one; `prompt`, in place of messages:
    the next turn begins a conversation of its own.
    """

    messages: tuple[Message, ...] = ()
    after: int | None = None
    prompt: Prompt | None = None
    done: bool = False
    reward: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.done != (self.reward is not None):
            raise ValueError("StepResult: a reward is given exactly when done")
        if self.done == bool(self.messages or self.prompt):
            raise ValueError("StepResult: an observation is given exactly when not done")
        if self.prompt is not None and (self.messages or self.after is not None):
            raise ValueError("StepResult: a prompt begins a conversation, so it follows no turn")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How a turn is sampled. `temperature` 0 is greedy. `stop` strings end a turn and stay in its tokens.

    `read_layers`: also return the policy's hidden state at the end of the prompt, after so many layers (0: all; None:
    none is wanted), as the mean over the last `read_tokens` tokens; engines that cannot do so leave it out.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 64
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    seed: int | None = None
    read_layers: int | None = None
    read_tokens: int = 10

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
    """What an environment asks of the policy's next turn; whatever it leaves open the run's settings say.

    `max_new_tokens`: at most so many tokens, and never more than the run allows (None: as the run says). `stop`:
    strings that end the turn.
    """

    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Tokens from `start` (index into the generated tokens) up to the next span were written by `policy_version`."""

    start: int
    policy_version: int


@dataclass(frozen=True, slots=True)
class HiddenState:
    """What the policy of `policy_version` made of a history: float32 numbers [hidden size], as bytes; the mean over its
    `num_tokens` last tokens."""

    policy_version: int
    num_tokens: int
    values: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What an engine generated for one prompt.

    `logprobs[i]` is log p(token_ids[i]) under the temperature-scaled distribution of the weights that wrote it
    (greedy, temperature 0: of the unscaled distribution). `cached_tokens` of the `prompt_tokens` were served from
    the KV cache. `prompt_state`: the hidden state at the end of the prompt, when it was asked for and the engine can;
    it is read from the tokens that were not cached.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    version_spans: tuple[VersionSpan, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    prompt_state: HiddenState | None = None

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.logprobs):
            raise ValueError(f"{len(self.token_ids)} tokens but {len(self.logprobs)} log-probabilities")
        if self.token_ids and (not self.version_spans or self.version_spans[0].start != 0):
            raise ValueError("version_spans must start at token 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyTurn:
    """One turn with all that is known of it, for environments that need more than its text.

    `text`: without the token that ends a turn. `truncated`: the turn does not end with that token. `decode` gives the
    text of any token ids. `message`: the turn as the tokenizer's own response template reads it, in the form of a chat
    message (None: the tokenizer has none, or cannot read the turn by it).
    """

    text: str
    truncated: bool
    completion: Completion
    decode: Callable[[Sequence[int]], str]
    message: Mapping[str, Json] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixQuery:
    """Asks for V(H) after `positions[k]` tokens of `token_ids`, for each k (ascending, each in 1..len(token_ids)).

    `turn_logprobs`: of every turn of the history the log-probabilities of what was generated in it. The positions are
    the ends of its last turns; a prompt has one position and no turn. `states`: of every position the policy's hidden
    state, where the engine has given them; none otherwise.
    """

    token_ids: tuple[int, ...]
    positions: tuple[int, ...]
    turn_logprobs: tuple[tuple[float, ...], ...] = ()
    states: tuple[HiddenState, ...] = ()


@dataclass(frozen=True, slots=True)
class Point:
    """The metrics of one step. `time`: Unix seconds."""

    step: int
    time: float
    metrics: Mapping[str, float]
