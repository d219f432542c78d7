"""A policy that says what a test tells it to, in real tokens of a Qwen-style tokenizer."""

from collections.abc import Callable
from typing import Any

from tests.unit.rollout.test_renderer import make_tokenizer
from trace_async.env import Domain
from trace_async.rollout.expansion import Expansion
from trace_async.rollout.grower import Grower
from trace_async.rollout.guard import EnvGuard, EnvLimits
from trace_async.rollout.limits import RolloutLimits
from trace_async.rollout.renderer import Renderer
from trace_async.trees.tree import RolloutTree
from trace_async.types import Completion, SamplingParams, Task, VersionSpan

TOKENIZER = make_tokenizer()
RENDERER = Renderer(TOKENIZER)


def limits(**changes) -> RolloutLimits:
    sampling = SamplingParams(max_new_tokens=200, stop_token_ids=RENDERER.stop_token_ids)
    base: dict[str, Any] = {"sampling": sampling, "max_context_tokens": 8000, "max_retries": 0}
    return RolloutLimits(**base | changes)


def call(key: str) -> str:
    return f'<tool_call>\n{{"name": "lookup", "arguments": {{"key":"{key}"}}}}\n</tool_call>'


class ScriptedPolicy:
    """`say(text of the context)` is the next turn; every request is kept."""

    def __init__(self, say: Callable[[str], str]) -> None:
        self.say = say
        self.prompts: list[tuple[int, ...]] = []
        self.params: list[SamplingParams] = []

    async def __call__(self, task: Task, prompt_ids: tuple[int, ...], params: SamplingParams) -> Completion:
        self.prompts.append(prompt_ids)
        self.params.append(params)
        text = self.say(TOKENIZER.decode(list(prompt_ids)))
        ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
        tokens = tuple([*ids, *RENDERER.stop_token_ids[:1]][: params.max_new_tokens])
        is_whole = tokens[-1] in RENDERER.stop_token_ids
        return Completion(
            token_ids=tokens,
            logprobs=tuple(-0.25 for _ in tokens),
            version_spans=(VersionSpan(0, 1),),
            finish_reason="stop" if is_whole else "length",
            prompt_tokens=len(prompt_ids),
            cached_tokens=0,
        )


def says(*turns: str) -> ScriptedPolicy:
    """The turns in order, whoever asks."""
    left = list(turns)
    return ScriptedPolicy(lambda _: left.pop(0))


async def grow_tree(
    domain: Domain,
    policy: ScriptedPolicy,
    expansion: Expansion | None = None,
    *,
    num_roots: int = 1,
    env_limits: EnvLimits | None = None,
    **changes,
) -> RolloutTree:
    """The tree of the domain's first task."""
    grower = Grower(EnvGuard(domain.make_env, env_limits), RENDERER, policy, limits(**changes))
    return await grower.grow(domain.tasks("train")[0], num_roots, expansion)
