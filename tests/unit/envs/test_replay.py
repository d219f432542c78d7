"""Forks by replay: the same turns lead to the same state, or nothing is continued from it."""

from collections import Counter

import pytest

from envs.contract.check import check_domain
from envs.example import GuessEnv, GuessNumber
from envs.gymnasium_adapter import Gymnasium
from envs.replay import ReplayEnv
from tests.unit.rollout.test_guard import grower, plan_all_on_the_first
from trace_async.config import ConfigError
from trace_async.env import ReplayDivergedError
from trace_async.rollout.expansion import Expansion
from trace_async.types import Message, StepResult, Task

TASK = GuessNumber().tasks("train")[3]  # the number 5
OPEN: Counter[str] = Counter()


class Counted(GuessEnv):
    """A guessing game that cannot be forked and counts what is open; `drift`: its answers tell what day it is."""

    day = 0

    def __init__(self, task: Task, max_turns: int = 4, *, drift: bool = False) -> None:
        super().__init__(task, max_turns)
        self.drift = drift
        OPEN["made"] += 1
        OPEN["open"] += 1

    async def step(self, action: str, *, truncated: bool = False) -> StepResult:
        Counted.day += self.drift
        result = await super().step(action)
        if result.done or not self.drift:
            return result
        return StepResult(messages=(Message(role="tool", content=f"lower {Counted.day}"),))

    async def fork(self) -> "Counted":
        raise NotImplementedError

    async def close(self) -> None:
        OPEN["open"] -= 1


@pytest.fixture(autouse=True)
def _counts():
    OPEN.clear()
    yield
    assert OPEN["open"] == 0


async def test_a_fork_goes_on_from_the_same_state_and_neither_sees_the_other():
    env = ReplayEnv(lambda: Counted(TASK))
    await env.init()
    assert (await env.step("guess 7")).messages[0].content == "lower"
    fork = await env.fork()
    other = await fork.fork()
    assert (await env.step("guess 5")).reward == 1.0
    assert (await fork.step("guess 2")).messages[0].content == "higher"
    assert (await fork.step("guess 3")).messages[0].content == "higher"
    result = await other.step("guess 5")
    assert (result.reward, result.metrics) == (1.0, {"turns_left": 2.0})
    for one in (env, fork, other):
        await one.close()
        await one.close()


async def test_a_fork_that_is_never_stepped_makes_no_environment():
    env = ReplayEnv(lambda: Counted(TASK))
    await env.init()
    for _ in range(3):
        await env.step("guess 7")
        await (await env.fork()).close()
    assert OPEN["made"] == 1
    await env.close()


async def test_an_answer_that_differs_is_named_by_its_turn():
    env = ReplayEnv(lambda: Counted(TASK, drift=True))
    await env.init()
    await env.step("guess 7")
    fork = await env.fork()
    with pytest.raises(ReplayDivergedError, match="turn 1 of 1 is answered otherwise than the first time"):
        await fork.step("guess 5")
    await fork.close()
    await env.close()


class Replayed(GuessNumber):
    def __init__(self, *, drift: bool = False) -> None:
        super().__init__()
        self.drift = drift

    def make_env(self, task: Task) -> ReplayEnv:  # type: ignore[override]
        return ReplayEnv(lambda: Counted(task, self.max_turns, drift=self.drift))


async def test_a_tree_grows_by_replay_and_what_diverges_is_counted():
    task = Replayed().tasks("train")[0]
    expansion = Expansion(plan=plan_all_on_the_first, per_root=2)
    tree = await grower(Replayed()).grow(task, 2, expansion)
    assert [rollout.kind for rollout in tree.rollouts] == ["root"] * 2 + ["continuation"] * 4
    assert tree.failures == {}
    tree = await grower(Replayed(drift=True), max_retries=2).grow(task, 2, expansion)
    assert tree.failures == {"replay_diverged": 4}
    assert "step(): turn 1 of 1 is answered otherwise" in tree.faults["step.replay_diverged"].words


def test_the_contract_holds_for_replayed_environments():
    assert [f.text for f in check_domain(Replayed(), num_tasks=1) if f.level == "error"] == []
    OPEN.clear()
    counter = "tests.unit.envs.test_contract:Counter"
    domain = Gymnasium(env=counter, num_train=3, num_heldout=2, max_turns=4, fork="replay")
    assert [f.text for f in check_domain(domain, num_tasks=1) if f.level == "error"] == []
    with pytest.raises(ConfigError, match=r"env\.args\.fork=deep: copy or replay"):
        Gymnasium(env=counter, fork="deep")  # type: ignore[arg-type]
