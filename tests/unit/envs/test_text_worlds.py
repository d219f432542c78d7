"""Simulators shared by replaying, with a simulator of ours; then the real ones, played by a scripted agent."""

import asyncio
import importlib.util
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from envs import load_domain
from envs.contract.check import check_domain
from envs.text_worlds.env import TextWorldEnv, WorldSettings, parse_command
from envs.text_worlds.pool import Game, Seen, SimulatorPool
from envs.text_worlds.scienceworld import in_order
from trace_async.config import ConfigError, EnvConfig
from trace_async.env import EnvError, ReplayDivergedError
from trace_async.types import Json


class Counting:
    """A simulator that adds up; `log` is shared by all of a pool. `drift` is in its answers, `dies_at` ends it."""

    def __init__(self, log: Counter[str], drift: Sequence[int] = (), dies_at: int = -1) -> None:
        log["started"] += 1
        self.log, self.drift, self.dies_at = log, list(drift), dies_at
        self.total = 0

    def reset(self, game: Game) -> Seen:
        self.log["reset"] += 1
        self.total = game[1]
        return Seen(f"you have {self.total}", 0.0)

    def step(self, action: str) -> Seen:
        self.log["step"] += 1
        self.total += int(action.removeprefix("add ")) + (self.drift.pop() if self.drift else 0)
        if self.total == self.dies_at:
            raise ConnectionError("gone")
        return Seen(f"you have {self.total}", min(1.0, self.total / 10), done=self.total >= 10)

    def valid_actions(self) -> str:
        return "add 1 , add 2"

    def close(self) -> None:
        self.log["closed"] += 1


def make_env(log: Counter[str], *, size: int = 1, **settings: Any) -> TextWorldEnv:
    return TextWorldEnv(SimulatorPool(lambda: Counting(log), size), ("sum", 3), WorldSettings(**settings))


async def told(env: TextWorldEnv, *actions: str) -> list[str]:
    answers = []
    for action in actions:
        result = await env.step(action)
        answers.append(result.messages[0].content if result.messages else f"end {result.reward:g}")
    return answers


async def test_a_rollout_alone_is_never_replayed() -> None:
    log: Counter[str] = Counter()
    env = make_env(log)
    assert (await env.init()).messages[-1].content == "you have 3"
    assert await told(env, "add 1", "help", "I think.\n> add 2", "add 4") == [
        *("you have 4", "add 1 , add 2", "you have 6", "end 1")
    ]
    assert log == {"started": 1, "reset": 1, "step": 3}


async def test_forks_go_on_by_replaying_and_do_not_see_each_other() -> None:
    log: Counter[str] = Counter()
    env = make_env(log)
    await env.init()
    await told(env, "add 1", "add 1")
    fork = await env.fork()
    assert await told(env, "add 2") == ["you have 7"]
    assert log["step"] == 3
    assert await told(fork, "add 3") == ["you have 8"]
    assert log["step"] == 3 + 2 + 1  # two again, then its own
    assert await told(env, "add 2") == ["you have 9"]


async def test_many_rollouts_share_few_simulators() -> None:
    log: Counter[str] = Counter()
    pool = SimulatorPool(lambda: Counting(log), 2)
    envs = [TextWorldEnv(pool, ("sum", number % 3), WorldSettings()) for number in range(12)]

    async def play(env: TextWorldEnv) -> list[str]:
        start = (await env.init()).messages[-1].content
        return [start, *await told(env, "add 1", "add 2", "add 3")]

    played = await asyncio.gather(*map(play, envs))
    assert played == [[f"you have {n}", *(f"you have {n + more}" for more in (1, 3, 6))] for n in (0, 1, 2) * 4]
    assert log["started"] <= 2
    pool.close()
    assert log["closed"] == log["started"]


async def test_a_simulator_that_dies_costs_one_step_and_is_replaced() -> None:
    log: Counter[str] = Counter()
    deaths = iter([5, -1])
    env = TextWorldEnv(SimulatorPool(lambda: Counting(log, dies_at=next(deaths)), 1), ("sum", 3), WorldSettings())
    await env.init()
    await told(env, "add 1")
    with pytest.raises(EnvError, match="the simulator broke down: ConnectionError: gone"):
        await env.step("add 1")
    assert (log["started"], log["closed"]) == (1, 1)
    fork = await env.fork()
    assert await told(fork, "add 1") == ["you have 5"]


async def test_a_world_that_answers_otherwise_at_the_second_time_is_no_fork() -> None:
    log: Counter[str] = Counter()
    pool = SimulatorPool(lambda: Counting(log, drift=[9, 0, 0]), 1)
    env = TextWorldEnv(pool, ("sum", 3), WorldSettings())
    await env.init()
    await told(env, "add 1")
    fork = await env.fork()
    await told(env, "add 1")
    with pytest.raises(ReplayDivergedError, match="action 1, 'add 1', brought 'you have 13' instead of 'you have 4'"):
        await fork.step("add 1")
    assert pool.start(("sum", 1)).text == "you have 1"  # the simulator itself is sound


async def test_a_simulator_that_cannot_start_says_why() -> None:
    def make() -> Counting:
        raise OSError("no such jar")

    with pytest.raises(EnvError, match="the simulator cannot be started: OSError: no such jar"):
        await TextWorldEnv(SimulatorPool(make, 1), ("sum", 3), WorldSettings()).init()


async def test_what_is_no_command_is_answered_and_costs_a_turn() -> None:
    log: Counter[str] = Counter()
    env = make_env(log, max_turns=3)
    await env.init()
    assert await told(env, " \n", "x" * 300, "add 1") == [
        "error ; no action found ; write help for what you can do",
        "error ; the turn is too long ; write help for what you can do",
        "end 0.4",
    ]
    graded = make_env(Counter(), max_turns=1, reward="success")
    await graded.init()
    assert (await graded.step("add 6")).reward == 0.0


def test_a_command_is_one_line_of_plain_words() -> None:
    assert parse_command("a\n b \x1b[31m\tc\u202e > go\x00 north ") == "go north"
    assert parse_command("go\u2028") == "go"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_turns": 0}, "env.args.max_turns=0: must be ≥ 1"),
        ({"reward": "both"}, "env.args.reward=both: progress or"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Json], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WorldSettings(**settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"env\.args\.num_simulators=0: 1 to 64"):
        SimulatorPool(lambda: Counting(Counter()), 0)


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("You see:\n\tan egg\n\ta cup\nAlso:\n\tB\n\tA", "You see:\n\ta cup\n\tan egg\nAlso:\n\tA\n\tB"),
        (
            "\ta table. On the table is: b, a cup (containing tea, milk), an egg.",
            "\ta table. On the table is: a cup (containing milk, tea), an egg, b.",
        ),
        ("nothing is listed, here", "nothing is listed, here"),
    ],
)
def test_lists_of_scienceworld_have_one_order(told: str, expected: str) -> None:
    assert in_order(told) == expected
    assert in_order(expected) == expected


async def test_the_same_words_in_another_order_are_no_other_answer() -> None:
    class Shuffling(Counting):
        def step(self, action: str) -> Seen:
            seen = super().step(action)
            return Seen(" ".join(reversed(seen.text.split())) if self.log["step"] % 2 else seen.text, seen.score)

    log: Counter[str] = Counter()
    env = TextWorldEnv(SimulatorPool(lambda: Shuffling(log), 1), ("sum", 3), WorldSettings())
    await env.init()
    await told(env, "add 1")
    fork = await env.fork()
    await told(env, "add 1", "add 1")
    assert await told(fork, "add 2") == ["6 have you"]


def needs(package: str) -> pytest.MarkDecorator:
    missing = [
        name
        for name, there in (("java", shutil.which("java")), (package, importlib.util.find_spec(package)))
        if not there
    ]
    return pytest.mark.skipif(bool(missing), reason=f"needs {' and '.join(missing)}: apt-get, pip install .[worlds]")


@pytest.fixture(scope="module")
def scienceworld() -> Iterator[Any]:
    domain = load_domain(
        EnvConfig(name="scienceworld", args={"task_names": ["find-living-thing"], "variations": 3, "max_turns": 30})
    )
    yield domain
    asyncio.run(domain.close())  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def cooking() -> Iterator[Any]:
    params = "numLocations=2,numIngredients=2,numDistractorItems=2,includeDoors=0,limitInventorySize=0"
    domain = load_domain(
        EnvConfig(name="textworld_express", args={"params": params, "num_train": 3, "num_heldout": 3, "max_turns": 30})
    )
    yield domain
    asyncio.run(domain.close())  # type: ignore[attr-defined]


async def play_with_a_fork(domain: Any, fork_after: int) -> tuple[float, float]:
    """A scripted agent plays a task of the train split; its fork goes on alike, after it went astray itself."""
    task = domain.tasks("train")[0]
    gold = domain.gold_actions(task)
    env = domain.make_env(task)
    await env.init()
    await told(env, *gold[:fork_after])
    fork = await env.fork()
    await told(env, "help", "look around", "inventory")
    result = None
    for action in gold[fork_after:]:
        result = await fork.step(action)
        if result.done:
            break
    assert result is not None
    assert result.done
    partial = domain.make_env(task)
    await partial.init()
    await told(partial, *gold[:-2])
    for _ in range(60):
        last = await partial.step("look around")
        if last.done:
            break
    return result.reward, last.reward


@needs("scienceworld")
async def test_a_scripted_agent_solves_scienceworld_from_a_fork(scienceworld: Any) -> None:
    won, half = await play_with_a_fork(scienceworld, 4)
    assert won == 1.0
    assert 0.0 < half < 1.0
    task = scienceworld.tasks("train")[1]
    prompts = {(await scienceworld.make_env(task).init()).messages for _ in range(4)}
    assert len(prompts) == 1
    ids = {split: {task.id for task in scienceworld.tasks(split)} for split in ("train", "heldout")}
    assert not ids["train"] & ids["heldout"]


@needs("textworld_express")
async def test_a_scripted_agent_cooks_in_textworld_express_from_a_fork(cooking: Any) -> None:
    won, half = await play_with_a_fork(cooking, 5)
    assert won == 1.0
    assert 0.0 < half < 1.0


@needs("textworld_express")
def test_textworld_express_keeps_the_contract() -> None:
    domain = load_domain(
        EnvConfig(name="textworld_express", args={"game": "coin", "num_train": 2, "num_heldout": 2, "max_turns": 20})
    )
    assert [finding.text for finding in check_domain(domain, num_tasks=2) if finding.level == "error"] == []


@needs("scienceworld")
@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("scienceworld", {"task_names": ["boyl"]}, r"env\.args\.task_names: no boyl; there are boil, change-"),
        ("textworld_express", {"game": "chess"}, "no game chess; there are cookingworld, twc"),
    ],
)
def test_wrong_games_are_named(name: str, args: dict[str, Json], message: str) -> None:
    domain: Any = load_domain(EnvConfig(name=name, args=args))
    with pytest.raises(ConfigError, match=message):
        domain.tasks("train")
    asyncio.run(domain.close())
