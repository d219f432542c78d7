"""The life of one prompt, with a counting game in place of a model: the environment's state is a running sum."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from trace_async.config import BudgetConfig
from trace_async.engine import EngineDeadError
from trace_async.env import EnvError, ReplayDivergedError
from trace_async.method.anchors import Anchor
from trace_async.method.market import Offer
from trace_async.method.registry import stage2_rule
from trace_async.rollout.expansion import Expansion
from trace_async.rollout.grower import Grower
from trace_async.rollout.guard import EnvGuard
from trace_async.rollout.limits import RolloutLimits
from trace_async.trees.tree import ROOT, RolloutTree
from trace_async.types import (
    Completion,
    LossKind,
    Message,
    PolicyTurn,
    PrefixQuery,
    Prompt,
    SamplingParams,
    StepResult,
    Task,
    TurnLimits,
    VersionSpan,
)

TASK = Task(id="t", domain="sum", kind="k", data={})
STOP = 9
OPEN_ENVS: Counter[int] = Counter()


class NumberRenderer:
    """One token per digit; 9 ends a turn, 8 opens the next one."""

    stop_token_ids = (STOP,)

    def render_prompt(self, prompt: Prompt) -> tuple[int, ...]:
        return (8, 8)

    def render_observation(self, messages: Sequence[Message], *, turn_ended: bool) -> tuple[int, ...]:
        digits = tuple(int(digit) for digit in messages[0].content)
        return (*digits, 8) if turn_ended else (STOP, *digits, 8)

    def read_message(self, token_ids: Sequence[int]) -> None:
        return None

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(str(token) for token in token_ids if token != STOP)


class SumEnv:
    """Adds up what is said; done after three turns with reward 1 when the sum is odd."""

    def __init__(self, said: tuple[int, ...] = (), *, breaks: Counter[str] | None = None) -> None:
        self.said = said
        self.breaks = breaks if breaks is not None else Counter()
        self.is_open = True
        OPEN_ENVS["open"] += 1

    async def init(self) -> Prompt:
        return Prompt(messages=(Message(role="user", content="add"),))

    async def step(self, action: str, *, truncated: bool = False) -> StepResult:
        if self.breaks["step"] > 0:
            self.breaks["step"] -= 1
            raise EnvError("tool server is gone")
        if self.breaks["bug"] > 0:
            self.breaks["bug"] -= 1
            raise KeyError("a bug of the environment")
        self.said += (int(action or 0),)
        if len(self.said) == 3:
            return StepResult(done=True, reward=float(sum(self.said) % 2))
        return StepResult(messages=(Message(role="user", content=str(sum(self.said) % 8)),))

    async def fork(self) -> "SumEnv":
        return SumEnv(self.said, breaks=self.breaks)

    async def close(self) -> None:
        if self.is_open:
            self.is_open = False
            OPEN_ENVS["open"] -= 1


@pytest.fixture(autouse=True)
def _all_envs_are_closed():
    OPEN_ENVS.clear()
    yield
    assert OPEN_ENVS["open"] == 0


def completion(*tokens: int) -> Completion:
    return Completion(
        token_ids=tokens,
        logprobs=(-0.5,) * len(tokens),
        version_spans=(VersionSpan(0, 3),),
        finish_reason="stop",
        prompt_tokens=7,
        cached_tokens=5,
    )


async def run_tree(task, make_env, renderer, generate, limits, *, num_roots, expansion=None) -> RolloutTree:
    async def ask(task: Task, prompt_ids: tuple[int, ...], params: SamplingParams) -> Completion:
        return await generate(prompt_ids, params)

    return await Grower(EnvGuard(make_env), renderer, ask, limits).grow(task, num_roots, expansion)


class Script:
    """Says the scripted digits in the order in which turns are asked for."""

    def __init__(self, *digits: int) -> None:
        self.digits = list(digits)
        self.prompts: list[tuple[int, ...]] = []

    async def __call__(self, prompt_ids: tuple[int, ...], params: SamplingParams) -> Completion:
        self.prompts.append(prompt_ids)
        return completion(self.digits.pop(0), STOP)


def limits(**changes) -> RolloutLimits:
    base: dict[str, Any] = {"sampling": SamplingParams(max_new_tokens=4), "max_context_tokens": 100, "max_retries": 1}
    return RolloutLimits(**base | changes)


async def no_values(queries: Sequence[PrefixQuery]) -> list[np.ndarray]:
    return [np.full(len(query.positions), 0.25) for query in queries]


async def test_one_root_rollout_is_a_chain_of_turns_with_their_own_tokens_only():
    generate = Script(1, 2, 4)
    tree = await run_tree(TASK, lambda _: SumEnv(), NumberRenderer(), generate, limits(), num_roots=1)
    assert [node.token_ids for node in tree.nodes] == [(8, 8), (1, 9, 1, 8), (2, 9, 3, 8), (4, 9)]
    assert [node.num_generated for node in tree.nodes] == [0, 2, 2, 2]
    assert [node.parent for node in tree.nodes] == [-1, 0, 1, 2]
    assert tree.nodes[1].logprobs == (-0.5, -0.5)
    assert (tree.nodes[1].prompt_tokens, tree.nodes[1].cached_tokens) == (7, 5)
    assert tree.rollouts[0].reward == 1.0  # 1 + 2 + 4 is odd
    assert generate.prompts == [(8, 8), (8, 8, 1, 9, 1, 8), (8, 8, 1, 9, 1, 8, 2, 9, 3, 8)]


async def test_a_continuation_goes_on_from_the_frozen_history_and_the_frozen_state():
    asked: list[Sequence[Anchor]] = []

    def second_turn(anchors: Sequence[Anchor], budget: int) -> np.ndarray:
        asked.append(anchors)
        return np.array([0, budget])

    generate = Script(1, 2, 4, 5, 6)
    expansion = Expansion(plan=second_turn, per_root=2, value=no_values)
    tree = await run_tree(
        TASK, lambda _: SumEnv(), NumberRenderer(), generate, limits(), num_roots=1, expansion=expansion
    )
    # Both continuations follow turn 2 (sum 3): 3 + 5 is even, 3 + 6 odd.
    assert [(r.kind, r.anchor, r.reward) for r in tree.rollouts] == [
        ("root", ROOT, 1.0),
        ("continuation", 2, 0.0),
        ("continuation", 2, 1.0),
    ]
    assert generate.prompts[3] == generate.prompts[4] == (8, 8, 1, 9, 1, 8, 2, 9, 3, 8)
    assert [(a.node, a.value, a.reward) for a in asked[0]] == [(1, 0.25, 1.0), (2, 0.25, 1.0)]
    assert tree.num_continuations_allocated == 2
    assert tree.nodes[1].value == 0.25


async def test_the_oracle_measures_prefixes_by_rollouts_that_do_not_enter_the_tree():
    asked: list[Sequence[Anchor]] = []

    def nothing(anchors: Sequence[Anchor], budget: int) -> np.ndarray:
        asked.append(anchors)
        return np.zeros(len(anchors), dtype=int)

    # By what was said before; the root rollout comes first everywhere.
    said = {(): iter((1,)), (1,): iter((2, 3, 3)), (1, 2): iter((4, 5, 6)), (1, 3): iter((1, 1))}

    async def generate(prompt_ids: tuple[int, ...], params: SamplingParams) -> Completion:
        before = tuple(prompt_ids[at - 1] for at, token in enumerate(prompt_ids) if token == STOP)
        return completion(next(said[before]), STOP)

    expansion = Expansion(plan=nothing, per_root=1, oracle_rollouts=2)
    tree = await run_tree(
        TASK, lambda _: SumEnv(), NumberRenderer(), generate, limits(), num_roots=1, expansion=expansion
    )
    # Turn 1 goes on with 3, 1 twice: 1 + 3 + 1 is odd. Turn 2 (sum 3) with 5 and 6: 3 + 5 is even, 3 + 6 odd.
    assert [(anchor.node, anchor.value) for anchor in asked[0]] == [(1, 1.0), (2, 0.5)]
    assert (len(tree.rollouts), len(tree.nodes)) == (1, 4)


async def test_several_rounds_spend_the_same_budget_and_may_continue_continuations():
    seen: list[int] = []

    def first(anchors: Sequence[Anchor], budget: int) -> np.ndarray:
        seen.append(len(anchors))
        counts = np.zeros(len(anchors), dtype=int)
        counts[0] = budget
        return counts

    generate = Script(1, 2, 4, *range(8), *range(8))
    expansion = Expansion(plan=first, per_root=3, rounds=2)
    tree = await run_tree(
        TASK, lambda _: SumEnv(), NumberRenderer(), generate, limits(), num_roots=1, expansion=expansion
    )
    # Round 1: 2 continuations of the first turn, each with one more non-terminal turn; round 2: 1 more.
    assert seen == [2, 4]
    assert tree.num_continuations_allocated == 3
    assert [r.round for r in tree.rollouts] == [0, 0, 0, 1]


async def top_up(*digits: int, num_roots: int, rounds: int = 1) -> RolloutTree:
    """Grow with further roots for three tokens of contrast in a hundred tokens, for what was believed to be even."""
    rule = stage2_rule(BudgetConfig(stage2="topup"), Offer(price=0.03))

    def plan(anchors: Sequence[Anchor], budget: int) -> np.ndarray:
        return rule.spend(anchors, budget, np.random.default_rng(0))

    expansion = Expansion(
        plan=plan, per_root=2, rounds=rounds, forks=rule.forks, buys_roots=rule.buys_roots, root_strength=2.0
    )
    return await run_tree(
        TASK,
        lambda _: SumEnv(),
        NumberRenderer(),
        Script(*digits),
        limits(),
        num_roots=num_roots,
        expansion=expansion,
    )


async def test_a_prompt_whose_roots_agree_is_topped_up_with_roots_and_one_whose_roots_differ_is_not():
    """Roots write 6 tokens. After one failure, Beta(1, 2): 1/3 and then 2/3·1/4 = 1/6 for 6 tokens, .056 and .028."""
    tree = await top_up(1, 1, 2, *(1, 0, 0), num_roots=1)
    assert [(r.kind, r.anchor, r.reward, r.round) for r in tree.rollouts] == [("root", 0, 0.0, 0), ("root", 0, 1.0, 1)]
    assert (tree.num_roots_allocated, tree.num_continuations_allocated) == (1, 1)
    # One of two that differ has nothing to be found any more.
    tree = await top_up(1, 1, 1, 1, 0, 1, num_roots=2)
    assert sorted(r.reward for r in tree.rollouts) == [0.0, 1.0]
    assert tree.num_continuations_allocated == 0


async def test_topping_up_in_two_rounds_looks_again_before_the_second():
    # The first further root fails as well: Beta(1, 3), 1/4 for 6 tokens = .042, so one more; it succeeds.
    tree = await top_up(1, 1, 2, 1, 1, 2, *(1, 0, 0), num_roots=1, rounds=2)
    assert [(r.reward, r.round) for r in tree.rollouts] == [(0.0, 0), (0.0, 1), (1.0, 2)]
    # The first one succeeds: the second round finds nothing open.
    tree = await top_up(1, 1, 2, 1, 0, 0, num_roots=1, rounds=2)
    assert [(r.reward, r.round) for r in tree.rollouts] == [(0.0, 0), (1.0, 1)]


async def test_what_breaks_down_is_tried_again_and_then_counted_but_never_a_reward():
    breaks = Counter(step=1)
    tree = await run_tree(
        TASK, lambda _: SumEnv(breaks=breaks), NumberRenderer(), Script(1, 1, 2, 4), limits(), num_roots=1
    )
    assert [r.reward for r in tree.rollouts] == [1.0]
    assert tree.failures == {}

    breaks = Counter(step=2)
    tree = await run_tree(TASK, lambda _: SumEnv(breaks=breaks), NumberRenderer(), Script(1, 1), limits(), num_roots=1)
    assert tree.rollouts == ()
    assert tree.failures == {LossKind.ENV: 1}


async def test_a_bug_in_an_environment_costs_its_rollout_and_not_the_run():
    breaks = Counter(bug=2)
    tree = await run_tree(TASK, lambda _: SumEnv(breaks=breaks), NumberRenderer(), Script(1, 1), limits(), num_roots=1)
    assert tree.failures == {LossKind.ENV: 1}


async def test_a_dead_engine_fails_the_rollout_by_its_own_kind_and_is_asked_again_by_the_router_only():
    asked = 0

    async def dead(prompt_ids: tuple[int, ...], params: SamplingParams) -> Completion:
        nonlocal asked
        asked += 1
        raise EngineDeadError("gone")

    tree = await run_tree(TASK, lambda _: SumEnv(), NumberRenderer(), dead, limits(), num_roots=2)
    assert tree.rollouts == ()
    assert tree.failures == {LossKind.ENGINE_DIED: 2}
    assert asked == 2


async def test_a_full_context_ends_the_rollout_with_reward_zero_and_is_not_continued():
    asked: list[Sequence[Anchor]] = []

    def plan(anchors: Sequence[Anchor], budget: int) -> np.ndarray:
        asked.append(anchors)
        return np.zeros(len(anchors), dtype=int)

    small = limits(max_context_tokens=10)  # prompt 2 + turn 4 + turn 4
    expansion = Expansion(plan=plan, per_root=1)
    tree = await run_tree(
        TASK, lambda _: SumEnv(), NumberRenderer(), Script(1, 2), small, num_roots=1, expansion=expansion
    )
    assert tree.rollouts[0].reward == 0.0
    assert tree.rollouts[0].metrics == {"overlong": 1.0}
    assert [a.node for a in asked[0]] == [1]


async def test_a_prompt_that_fills_the_context_is_left_out_in_words_that_name_the_setting():
    tree = await run_tree(
        TASK, lambda _: SumEnv(), NumberRenderer(), Script(), limits(max_context_tokens=2), num_roots=2
    )
    assert tree.failures == {LossKind.PROMPT_TOO_LONG: 2}
    fault = tree.faults["init.prompt_too_long"]
    assert fault.count == 2  # a second try cannot help
    assert "task t" in fault.words
    assert "sampling.max_context_tokens=2" in fault.words


async def test_a_turn_cut_at_its_limit_ends_with_an_added_end_of_turn():
    async def cut(prompt_ids: tuple[int, ...], params: SamplingParams) -> Completion:
        return completion(1)

    tree = await run_tree(TASK, lambda _: SumEnv(), NumberRenderer(), cut, limits(), num_roots=1)
    assert tree.nodes[1].token_ids == (1, STOP, 1, 8)
    assert tree.nodes[1].num_generated == 1


async def test_cancelling_a_prompt_closes_every_environment():
    started = asyncio.Event()

    async def hangs_at_the_second_turn(prompt_ids: tuple[int, ...], params: SamplingParams) -> Completion:
        if len(prompt_ids) > 2:
            started.set()
            await asyncio.sleep(60)
        return completion(1, STOP)

    expansion = Expansion(plan=lambda anchors, budget: np.zeros(len(anchors), dtype=int), per_root=1)
    run = asyncio.create_task(
        run_tree(
            TASK,
            lambda _: SumEnv(),
            NumberRenderer(),
            hangs_at_the_second_turn,
            limits(),
            num_roots=2,
            expansion=expansion,
        )
    )
    await started.wait()
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run


class DivergingEnv(SumEnv):
    """A state kept after a turn cannot be brought back: its own fork fails."""

    is_kept = False

    async def fork(self) -> "DivergingEnv":
        if self.is_kept:
            raise ReplayDivergedError("call 1 was another one")
        twin = DivergingEnv(self.said)
        twin.is_kept = True
        return twin


async def test_a_turn_whose_replay_diverges_is_closed_counted_and_not_tried_again():
    offered: list[list[int]] = []

    def all_on_the_first(anchors: Sequence[Anchor], budget: int) -> np.ndarray:
        offered.append([anchor.node for anchor in anchors])
        return np.array([budget, *[0] * (len(anchors) - 1)])

    generate = Script(1, 2, 4)
    expansion = Expansion(plan=all_on_the_first, per_root=4, rounds=2)
    tree = await run_tree(
        TASK,
        lambda _: DivergingEnv(),
        NumberRenderer(),
        generate,
        limits(max_retries=3),
        num_roots=1,
        expansion=expansion,
    )
    # Two continuations of turn 1 in the first round, two of turn 2 in the second: no one generates anything.
    assert offered == [[1, 2], [2]]
    assert tree.failures == {"replay_diverged": 4}
    assert len(generate.prompts) == 3


async def test_another_prompt_at_the_second_rollout_costs_that_rollout_and_not_the_run():
    class NewPromptRenderer(NumberRenderer):
        prompts = iter([(8, 8), (8, 7)])

        def render_prompt(self, prompt: Prompt) -> tuple[int, ...]:
            return next(self.prompts)

    tree = await run_tree(
        TASK, lambda _: SumEnv(), NewPromptRenderer(), Script(1, 2, 4), limits(max_retries=0), num_roots=2
    )
    assert [rollout.reward for rollout in tree.rollouts] == [1.0]
    assert tree.failures == {LossKind.ENV: 1}


async def test_a_program_that_asks_for_turns_sets_their_limits_and_sees_their_tokens():
    seen: list[PolicyTurn] = []

    class AskingSum(SumEnv):
        def next_limits(self) -> TurnLimits:
            return TurnLimits(max_new_tokens=(2, 50)[len(self.said) % 2], stop=("stop",))

        async def answer(self, turn: PolicyTurn) -> StepResult:
            seen.append(turn)
            return await SumEnv.step(self, turn.text, truncated=turn.truncated)

    asked: list[SamplingParams] = []
    says = Script(1, 2, 4)

    async def generate(prompt_ids: tuple[int, ...], params: SamplingParams) -> Completion:
        asked.append(params)
        return await says(prompt_ids, params)

    tree = await run_tree(TASK, lambda _: AskingSum(), NumberRenderer(), generate, limits(), num_roots=1)
    assert [(params.max_new_tokens, params.stop) for params in asked] == [
        (2, ("stop",)),
        (4, ("stop",)),
        (2, ("stop",)),
    ]
    assert [turn.completion.token_ids for turn in seen] == [(1, STOP), (2, STOP), (4, STOP)]
    assert [(turn.text, turn.truncated) for turn in seen] == [("1", False), ("2", False), ("4", False)]
    assert tree.rollouts[0].reward == 1.0
