"""No prompt waits for another: one whose tool hangs does not keep the next from Stage 2, in the same PromptActor."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from actors.generators.router import Generators
from actors.predictors.group import Answering
from actors.prompts.prompt import HeldOut, PromptActor
from trace_async.config import load_config
from trace_async.predictor.features import NUM_FEATURES
from trace_async.predictor.head import StateHead
from trace_async.predictor.heads import Heads
from trace_async.run.state import PendingPrompt
from trace_async.types import (
    Completion,
    HiddenState,
    Message,
    PrefixQuery,
    Prompt,
    SamplingParams,
    Split,
    StepResult,
    Task,
    VersionSpan,
)

HANG = asyncio.Event()


class Gate:
    """Two turns; the first waits for HANG when the task says so. Reward 1 when the answer is w9."""

    def __init__(self, task: Task, turn: int = 0) -> None:
        self.task, self.turn = task, turn

    async def init(self) -> Prompt:
        return Prompt(messages=(Message(role="user", content="w4"),))

    async def step(self, action: str, *, truncated: bool = False) -> StepResult:
        self.turn += 1
        if self.turn == 2:
            return StepResult(done=True, reward=float(action.strip() == "w9"))
        if self.task.kind == "slow":
            await HANG.wait()
        return StepResult(messages=(Message(role="user", content="w5"),))

    async def fork(self) -> "Gate":
        return Gate(self.task, self.turn)

    async def close(self) -> None: ...


class Gates:
    name = "gates"

    def tasks(self, split: Split) -> Sequence[Task]:
        return [Task(id=kind, domain=self.name, kind=kind, data={}) for kind in ("slow", "fast")]

    def make_env(self, task: Task) -> Gate:
        return Gate(task)


class Remote:
    """Ray's call shape around a coroutine function."""

    def __init__(self, call) -> None:
        self.remote = call


class Generator:
    """Answers w8 and w9 in turn (ids 8 and 9), ended by <|im_end|> (id 2)."""

    def __init__(self) -> None:
        self.said = 0
        self.generate = Remote(self._generate)

    async def _generate(self, prompt_ids: tuple[int, ...], params: SamplingParams) -> Completion:
        self.said += 1
        tokens = (8 + self.said % 2, 2)
        return Completion(
            token_ids=tokens,
            logprobs=(-0.7, -0.1),
            version_spans=(VersionSpan(0, 0),),
            finish_reason="stop",
            prompt_tokens=len(prompt_ids),
            cached_tokens=0,
        )


class GeneratorWithStates(Generator):
    """Gives a state of width 4 with every turn, as the embedded engine does."""

    async def _generate(self, prompt_ids: tuple[int, ...], params: SamplingParams) -> Completion:
        state = HiddenState(0, 1, np.ones(4, np.float32).tobytes())
        return replace(await super()._generate(prompt_ids, params), prompt_state=state)


class Predictor(Answering):
    """Answers one half, and needs no actor for it."""

    def __init__(self) -> None:
        super().__init__(actors=(), limit_s=1.0)

    async def values(self, queries: Sequence[PrefixQuery]) -> list[np.ndarray]:
        return [np.full(len(query.positions), 0.5) for query in queries]


@pytest.fixture
async def actor(tiny_policy_path: Path) -> PromptActor:
    config = load_config(
        None, ["env.name=tests.ray.test_prompt:Gates", "budget.continuations_per_root=2", "actors.prompts_per_actor=8"]
    )
    made = PromptActor(config, str(tiny_policy_path), Predictor())
    await made.announce(Generators({"g": Generator()}), {})
    return made


def prompt(kind: str) -> tuple[Task, PendingPrompt]:
    task = Task(id=kind, domain="gates", kind=kind, data={})
    return task, PendingPrompt(task_id=kind, num_roots=2, policy_version=0, root_value=0.5, seed=0)


async def test_a_prompt_goes_through_stage_2_while_another_one_hangs(actor: PromptActor):
    HANG.clear()
    slow = asyncio.create_task(actor.run_prompt(*prompt("slow")))
    fast = await asyncio.wait_for(actor.run_prompt(*prompt("fast")), 10)
    assert not slow.done()
    assert [r.kind for r in fast.rollouts] == ["root"] * 2 + ["continuation"] * 4
    assert fast.num_continuations_allocated == 4
    assert {node.value for node in fast.nodes} == {0.5, None}
    HANG.set()
    tree = await asyncio.wait_for(slow, 10)
    assert len(tree.rollouts) == 6


async def test_who_has_heads_and_states_asks_nobody_for_values(actor: PromptActor):
    HANG.set()
    width = 4 + NUM_FEATURES
    weights = np.zeros(width)
    weights[:4] = np.log(4) / 4  # of a state of ones: log-odds ln 4, V = .8
    head = StateHead(np.zeros(width), np.ones(width), weights, 0.0)
    await actor.take_learnt(Heads.untrained(4).with_head("prefix", head).packed(1))
    asked = await actor.run_prompt(*prompt("fast"))  # the engine gave no states
    assert {node.value for node in asked.nodes} == {0.5, None}
    await actor.announce(Generators({"g": GeneratorWithStates()}), {})
    actor.predictor = None
    tree = await actor.run_prompt(*prompt("fast"))
    assert tree.num_continuations_allocated == 4
    assert [node.value for node in tree.nodes if node.value not in (None, 0.5)] == pytest.approx([0.8, 0.8])


async def test_evaluation_is_a_tree_a_task_and_the_prompt_is_what_the_predictor_is_asked_about(actor: PromptActor):
    HANG.set()
    tasks = Gates().tasks("heldout")
    trees = await actor.evaluate(tasks, HeldOut(temperature=1.0, num_samples=3, policy_version=7, tasks_at_once=1))
    assert [(t.task.id, len(t.rollouts), t.num_generated_tokens, t.policy_version_started) for t in trees] == [
        ("slow", 3, 12, 7),
        ("fast", 3, 12, 7),
    ]
    queries = await actor.prompt_queries(tasks)
    assert queries[0].positions == (len(queries[0].token_ids),)


async def test_the_oracle_plays_the_asked_number_of_rollouts_per_task(actor: PromptActor):
    HANG.set()
    rewards = await actor.measure(Gates().tasks("train"), 3)
    assert [len(some) for some in rewards] == [3, 3]
    assert {reward for some in rewards for reward in some} <= {0.0, 1.0}
