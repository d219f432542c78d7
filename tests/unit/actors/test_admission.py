"""Admission in plain asyncio: prompts start as others end, what is lost is replaced, silence is an error."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from actors.admission import Admission
from tests.support.fake_parts import FakePredictor, FakePrompts
from trace_async.config import Config, load_config
from trace_async.run.rounds import NothingToLearnError
from trace_async.trees.tree import RolloutTree
from trace_async.types import LossKind, PrefixQuery, Task

TASKS = [Task(id=f"t{i}", domain="d", kind="k", data={}) for i in range(40)]


def config(*overrides: str) -> Config:
    small = ["budget.root_rollouts=16", "budget.pool_size=8", "budget.max_rollouts=4", "budget.warmup_rounds=0"]
    return load_config(None, [*small, "num_updates=6", *overrides])


class Run:
    """An admission with its updates, as the trainer makes them."""

    def __init__(self, prompts: FakePrompts, *overrides: str, tasks: Sequence[Task] = TASKS, now: float = 0.0) -> None:
        self.prompts = prompts
        self.predictor = FakePredictor()
        self.now = now
        self.admission = Admission(
            config(*overrides), tasks, prompts, self.predictor, Path("logs"), now=lambda: self.now
        )

    async def updates(self) -> list[list[RolloutTree]]:
        """All updates of the run."""
        taken = []
        background = asyncio.create_task(self.admission.run())
        try:
            while trees := await self._take(background):
                self.admission.account(trees, updated=True)
                taken.append(trees)
        finally:
            background.cancel()
            await asyncio.gather(background, return_exceptions=True)
        return taken

    async def _take(self, background: asyncio.Task[None]) -> list[RolloutTree]:
        take = asyncio.create_task(self.admission.take())
        await asyncio.wait([take, background], return_when=asyncio.FIRST_COMPLETED)
        if background.done():
            take.cancel()
            background.result()
        return take.result()


@pytest.mark.parametrize("staleness", [0, 1, 2])
async def test_a_run_ends_with_whole_updates_within_the_bound(staleness: int):
    run = Run(FakePrompts(), f"actors.max_staleness={staleness}")
    sizes = [sum(tree.num_roots_allocated for tree in trees) for trees in await run.updates()]
    assert len(sizes) == 6
    assert all(16 <= size <= 16 + 3 for size in sizes)
    state = run.admission.state
    assert state.ledger.trained == state.ledger.allocated
    assert state.ledger.trained == {"root": sum(sizes)}
    assert run.predictor.num_estimated == 8 * state.num_rounds


async def test_no_more_grows_at_a_time_than_may_be_ahead_of_the_learner():
    prompts = FakePrompts(delays=lambda ticket: 100)
    await Run(prompts, "actors.max_staleness=2").updates()
    assert 32 <= prompts.most_roots_under_way < 32 + 4


async def test_what_is_lost_is_replaced_and_updates_keep_their_size():
    prompts = FakePrompts(lose=lambda ticket: LossKind.TREE_TIMEOUT if ticket % 3 == 0 else None)
    run = Run(prompts, "actors.max_staleness=4")
    sizes = [sum(len(tree.rollouts) for tree in trees) for trees in await run.updates()]
    assert len(sizes) == 6
    assert all(size >= 16 for size in sizes)
    ledger = run.admission.state.ledger
    assert ledger.failed[LossKind.TREE_TIMEOUT] > 16
    ledger.check(waiting=0, in_flight_roots=0)


async def test_a_run_in_which_every_prompt_is_lost_ends_in_words():
    run = Run(FakePrompts(lose=lambda ticket: LossKind.PROMPT_ACTOR_DIED))
    with pytest.raises(NothingToLearnError, match=r"nearly every rollout breaks down.*prompt_actor_died.*logs"):
        await run.updates()


async def test_a_candidate_that_cannot_be_started_is_left_out_and_counted():
    class Broken(FakePrompts):
        async def prompt_queries(self, tasks: Sequence[Task]) -> list[PrefixQuery | LossKind]:
            queries = await super().prompt_queries(tasks)
            return [LossKind.ENV if task.id == "t7" else query for task, query in zip(tasks, queries, strict=True)]

    run = Run(Broken())
    assert len(await run.updates()) == 6
    assert run.prompts.grown["t7"] == 0
    assert run.admission.state.lost_candidates == {LossKind.ENV: 1}
    assert sum(run.admission.state.ledger.failed.values()) == 0


class LazyTasks(Sequence[Task]):
    """Tasks that are made when they are asked for; every so many cannot be."""

    def __init__(self, every: int) -> None:
        self.every = every

    def __len__(self) -> int:
        return 30

    def __getitem__(self, index):
        if index % self.every == 0:
            raise ValueError(f"row {index} has no question")
        return Task(id=f"{index}", domain="d", kind="k", data={})


async def test_a_task_that_turns_out_to_be_none_when_it_is_drawn_is_left_out_and_counted(
    caplog: pytest.LogCaptureFixture,
):
    run = Run(FakePrompts(), tasks=LazyTasks(every=3))
    trees = [tree for update in await run.updates() for tree in update]
    assert {int(tree.task.id) % 3 for tree in trees} == {1, 2}
    state = run.admission.state
    assert state.num_updates == 6
    assert list(state.lost_candidates) == [LossKind.ENV]
    assert run.admission.faults.read() == {"faults/tasks.env_error": state.lost_candidates[LossKind.ENV]}
    assert "has no question (further ones of this kind" in caplog.text
    assert run.admission.iterator.find(["4", "5", "gone"]).keys() == {"4", "5"}  # as a resumed run looks for them


async def test_tasks_that_can_never_be_made_end_the_run_in_words():
    with pytest.raises(NothingToLearnError, match=r"in 5 pools in a row none of 8 .*40 env_error"):
        await Run(FakePrompts(), tasks=LazyTasks(every=1)).updates()


async def test_data_of_which_nothing_can_be_started_end_the_run_in_words():
    class Broken(FakePrompts):
        async def prompt_queries(self, tasks: Sequence[Task]) -> list[PrefixQuery | LossKind]:
            return [LossKind.ENV for _ in tasks]

    with pytest.raises(NothingToLearnError, match=r"5 pools in a row none of 8 .*40 env_error.*env check"):
        await Run(Broken()).updates()


async def test_a_pool_larger_than_the_data_holds_every_task_once():
    asked: list[list[str]] = []

    class Listening(FakePrompts):
        async def prompt_queries(self, tasks: Sequence[Task]) -> list[PrefixQuery | LossKind]:
            asked.append([task.id for task in tasks])
            return await super().prompt_queries(tasks)

    await Run(Listening(), "budget.pool_size=60").updates()
    assert all(sorted(pool) == sorted(task.id for task in TASKS) for pool in asked)


async def test_prompts_that_never_end_are_an_error_with_the_clock_started_by_the_wait():
    prompts = FakePrompts()
    prompts.gate.clear()
    run = Run(prompts, "actors.tree_timeout_s=10", "actors.max_rollout_retries=1")
    run.now = 5000.0  # the start took long, and an evaluation: nobody's fault
    updating = asyncio.create_task(run.updates())
    while not prompts.under_way:
        await asyncio.sleep(0)
    run.now += 31
    run.admission._notify()
    with pytest.raises(NothingToLearnError, match="no tree has ended for 31 s: 8 prompts are under way"):
        await updating


async def test_an_error_that_is_nobodys_loss_ends_the_run_as_it_is():
    class Broken(FakePrompts):
        async def run(self, *arguments: object) -> RolloutTree:
            raise ZeroDivisionError("a fault of ours")

    with pytest.raises(ZeroDivisionError, match="a fault of ours"):
        await Run(Broken()).updates()


async def test_a_snapshot_goes_on_with_the_same_prompts_and_skips_no_candidate():
    prompts = FakePrompts()
    prompts.gate.clear()
    first = Run(prompts)
    running = asyncio.create_task(first.admission.run())
    while not (first.admission.rounds.planned and prompts.under_way):
        await asyncio.sleep(0)
    saved = first.admission.snapshot()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert saved.pending
    assert saved.planned
    assert saved.dataset["position"] == 8 * saved.state.num_rounds

    again = Run(FakePrompts())
    again.admission.restore(saved)
    assert len(await again.updates()) == 6
    pending = {prompt.task_id for prompt in saved.pending.values()}
    assert all(again.prompts.grown[task] for task in pending)
    again.admission.state.ledger.check(waiting=0, in_flight_roots=0)


async def test_a_checkpoint_with_tasks_that_are_gone_is_refused():
    run = Run(FakePrompts())
    running = asyncio.create_task(run.admission.run())
    while not run.admission.rounds.pending:
        await asyncio.sleep(0)
    saved = run.admission.snapshot()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    other = [Task(id=f"other {i}", domain="d", kind="k", data={}) for i in range(40)]
    with pytest.raises(ValueError, match="tasks that are not in the data any more"):
        Admission(config(), other, FakePrompts(), FakePredictor(), Path("logs")).restore(saved)
