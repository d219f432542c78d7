"""Quests: every generated world can be won, what a player does wrong is answered, forks and splits are apart."""

import asyncio
from collections import deque
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.quest import game
from envs.quest.demonstrations import Habits, demonstrate
from envs.quest.domain import Quest, QuestEnv, parse_command
from envs.quest.world import (
    KINDS,
    SHAPES,
    Barrier,
    Room,
    World,
    make_world,
    split_of,
    world_from_json,
    world_to_json,
)
from trace_async.config import ConfigError
from trace_async.policy.small_tokenizer import build_tokenizer
from trace_async.types import Json

# hall ──[witch who wants moss then salt]── tower (crown); south of the hall a cellar with both and a pearl.
SMALL = World(
    rooms={
        "hall": Room("hall", {"north": "tower", "south": "cellar"}, ()),
        "cellar": Room("cellar", {"north": "hall"}, ("salt", "moss", "pearl")),
        "tower": Room("tower", {"south": "hall"}, ("crown",)),
    },
    line=("hall", "tower"),
    barriers=(Barrier("witch", ("moss", "salt")),),
    treasure="crown",
)
seeds = st.integers(0, 10**9)


def make_env(
    world: World = SMALL, *, max_turns: int = 40, reward: str = "success", step_seconds: float = 0.0
) -> QuestEnv:
    return QuestEnv(world, max_turns=max_turns, reward=reward, step_seconds=step_seconds, rules="")  # type: ignore[arg-type]


def with_barrier(barrier: Barrier) -> World:
    """`SMALL` with another barrier, and what it needs and lures with in the cellar."""
    things = (*barrier.needs, *filter(None, [barrier.lure]), "boot")
    rooms = {**SMALL.rooms, "cellar": Room("cellar", {"north": "hall"}, things)}
    return World(rooms, SMALL.line, (barrier,), "crown")


async def told(env: QuestEnv, *commands: str) -> list[str]:
    answers = []
    for command in commands:
        result = await env.step(command)
        answers.append(result.messages[0].content if result.messages else f"end {result.reward:g}")
    return answers


def fewest_commands(world: World) -> int | None:
    """Breadth-first search over everything that can be done: how few commands win, None when nothing does."""
    first = game.start(world)
    queue = deque([(first, 0)])
    known = {_key(first)}
    while queue:
        state, count = queue.popleft()
        for command in game.valid_commands(world, state):
            if command.startswith("drop"):
                continue  # nothing is ever in the way of a hand
            after, _ = game.obey(world, state, command)
            if after.outcome == "won":
                return count + 1
            if not after.outcome and _key(after) not in known:
                known.add(_key(after))
                queue.append((after, count + 1))
    return None


def _key(state: game.State) -> tuple[object, ...]:
    return state.room, frozenset(state.held), state.opened, state.added, state.lit


async def test_a_quest_is_told_played_and_won() -> None:
    env = make_env()
    prompt = await env.init()
    assert [m.content for m in prompt.messages] == [
        "quest : crown ; on the way witch ; hall ; north witch who wants moss then salt , south unknown"
    ]
    assert await told(env, "go south", "take moss", "take salt", "bag", "go north") == [
        "cellar ; north hall ; here salt , moss , pearl",
        "taken",
        "taken",
        "you hold moss , salt",
        "hall ; north witch who wants moss then salt , south cellar",
    ]
    assert await told(env, "go north", "add moss", "add salt", "go north") == [
        "the way is closed",
        "the witch stirs",
        "the way is open",
        "tower ; south hall ; here crown",
    ]
    last = await env.step("take crown")
    assert (last.done, last.reward) == (True, 1.0)
    assert last.metrics == {"success": 1.0, "progress": 1.0, "turns": 10.0, "malformed_turns": 0.0}


async def test_what_was_wrong_is_said_and_what_can_be_done_is_listed() -> None:
    assert await told(make_env(), "dance", "go", "go west", "take crown", "drop moss", "use moss", "help") == [
        "i do not know that ; write help for what you can do",
        "i do not know that ; write help for what you can do",
        "there is no way",
        "that is not here",
        "you do not hold that",
        "you do not hold that",
        "you can go south",
    ]
    env = make_env()
    await told(env, "go south", "take moss")
    assert await told(env, "add moss", "give moss", "use moss", "light moss", "help") == [
        *["nothing happens"] * 4,
        "you can go north , take salt , take pearl , drop moss",
    ]
    assert (await env.step("go", truncated=True)).messages[0].content == (
        "error ; the turn was cut at its token limit before it ended ; write help for what you can do"
    )


@pytest.mark.parametrize(
    ("barrier", "right", "wrong", "ending"),
    [
        (Barrier("door", ("red key",)), ["use red key", "go north"], None, ""),
        (Barrier("vines", ("knife",)), ["use knife", "go north"], None, ""),
        (Barrier("stairs", ("lamp",)), ["light lamp", "go north"], ["go north"], game.FELL),
        (Barrier("guard", ("bread",), "gold"), ["give bread", "go north"], ["give gold"], game.THROWN_OUT),
        (Barrier("witch", ("moss", "salt")), ["add moss", "add salt", "go north"], ["add salt"], game.POISONED),
        (Barrier("witch", ("moss", "salt")), ["add moss", "add salt", "go north"], ["add moss", "add boot"], "poison"),
    ],
)
async def test_every_barrier_opens_to_the_right_thing_and_a_crux_forgives_no_wrong_one(
    barrier: Barrier, right: list[str], wrong: list[str] | None, ending: str
) -> None:
    fetch = [
        "go south",
        *(f"take {thing}" for thing in (*barrier.needs, *filter(None, [barrier.lure]), "boot")),
        "go north",
    ]
    env = make_env(with_barrier(barrier), reward="progress")
    await told(env, *fetch)
    twin = await env.fork()
    assert (await told(env, *right))[-1] == "tower ; south hall ; here crown"
    if wrong is None:
        assert await told(twin, "use boot", "go north") == ["nothing happens", "the way is closed"]
        return
    assert (await told(twin, *wrong))[-1] == "end 0"
    assert ending in twin._state.outcome


async def test_a_lamp_that_is_dropped_goes_out() -> None:
    env = make_env(with_barrier(Barrier("stairs", ("lamp",))))
    assert (await told(env, "go south", "take lamp", "light lamp", "drop lamp", "go north", "go north"))[-1] == "end 0"


async def test_partial_credit_is_the_share_of_the_way() -> None:
    play = ["go south", "take moss", "take salt", "go north", "add moss", "add salt", "look", "look"]
    graded, binary = make_env(max_turns=8, reward="progress"), make_env(max_turns=8)
    assert (await told(graded, *play))[-1] == "end 0.5"
    assert (await told(binary, *play))[-1] == "end 0"


@pytest.mark.parametrize(
    ("turn", "command"),
    [
        ("go north", "go north"),
        ("the way is closed > look", "look"),
        ("First I think.\n\n  Take   RED Key. \n", "take red key"),
    ],
)
def test_a_turn_ends_with_its_command(turn: str, command: str) -> None:
    assert parse_command(turn) == command


@given(turns=st.lists(st.one_of(st.text(max_size=40), st.sampled_from(["go south", "take moss", "> "])), min_size=6))
@settings(max_examples=50, deadline=None)
def test_no_turn_breaks_the_environment(turns: list[str]) -> None:
    async def run() -> None:
        env = make_env(max_turns=6)
        for turn in turns:
            if (result := await env.step(turn)).done:
                break
        assert result.done
        assert result.reward in (0.0, 1.0)

    asyncio.run(run())


@given(kind=st.sampled_from(KINDS), seed=seeds)
@settings(max_examples=60, deadline=None)
def test_every_generated_world_can_be_won(kind: str, seed: int) -> None:
    world = make_world(kind, Random(seed))
    fewest = fewest_commands(world)
    shown = demonstrate(world, Habits(), Random(seed))
    assert fewest is not None
    assert fewest <= len(shown) <= 40  # the default max_turns
    state = game.start(world)
    for command in shown:
        assert command in game.valid_commands(world, state)
        state, _ = game.obey(world, state, command)
    assert state.outcome == "won"
    assert game.progress(world, state) == 1.0
    assert world_from_json(world_to_json(world)) == world


@given(seed=seeds, kind=st.sampled_from(KINDS))
@settings(max_examples=40, deadline=None)
def test_a_world_without_what_its_last_barrier_needs_cannot_be_won(seed: int, kind: str) -> None:
    world = make_world(kind, Random(seed))
    lost = world.barriers[-1].needs[-1]
    rooms = {
        name: Room(room.name, room.exits, tuple(thing for thing in room.things if thing != lost))
        for name, room in world.rooms.items()
    }
    assert fewest_commands(World(rooms, world.line, world.barriers, world.treasure)) is None


@given(seed=seeds, kind=st.sampled_from(KINDS), after=st.integers(0, 12))
@settings(max_examples=40, deadline=None)
def test_forks_go_their_own_ways(seed: int, kind: str, after: int) -> None:
    world = make_world(kind, Random(seed))
    commands = demonstrate(world, Habits(), Random(seed))

    async def run() -> None:
        alone, forked = make_env(world), make_env(world)
        before = await told(forked, *commands[:after])
        fork = await forked.fork()
        await told(forked, *(command for command in ["take boot", "drop boot", "look", "bag"]))
        await told(forked, *(f"drop {thing}" for thing in forked._state.held))
        assert before + await told(fork, *commands[after:]) == await told(alone, *commands)

    asyncio.run(run())


@given(seed=seeds, kind=st.sampled_from(KINDS), misstep=st.sampled_from([0.0, 0.5, 1.0]))
@settings(max_examples=40, deadline=None)
def test_demonstrations_end_and_missteps_lose(seed: int, kind: str, misstep: float) -> None:
    world = make_world(kind, Random(seed))
    commands = demonstrate(world, Habits(misstep=misstep, dawdle=0.1), Random(seed))
    state = game.start(world)
    for command in commands:
        assert not state.outcome
        state, answer = game.obey(world, state, command)
        assert answer != game.UNKNOWN_COMMAND
    assert state.outcome
    if misstep in (0.0, 1.0):
        assert (state.outcome == "won") == (misstep == 0.0 or "c" not in "".join(SHAPES[kind]))


async def test_the_vocabulary_covers_whatever_is_read_and_written() -> None:
    domain = Quest(mix=dict.fromkeys(KINDS, 1.0))
    tokenizer = build_tokenizer(domain.vocabulary())
    words = set(tokenizer.get_vocab())
    texts: list[str] = []
    for index in range(60):
        task = domain.demonstration_tasks()[index]
        env = domain.make_env(task)
        texts += [message.content for message in (await env.init()).messages]
        for command in domain.demonstrate(task, Random(index)):
            help_env = await env.fork()
            for asked in ("help", "bag", "", "go nowhere", "x" * 30_000):
                texts += [m.content for m in (await help_env.step(asked)).messages]
            texts.append(command)
            texts += [m.content for m in (await env.step(command)).messages]
    for text in texts:
        assert all(len(token) > 2 or not token[-1].isalpha() for token in tokenizer.tokenize(text) if token in words), (
            text
        )
        assert tokenizer.unk_token not in tokenizer.tokenize(text)


def test_train_and_heldout_share_no_world() -> None:
    domain = Quest(num_train=200, num_heldout=100)
    worlds: dict[str, set[str]] = {}
    for split in ("train", "heldout"):
        tasks = domain.tasks(split)
        assert len({task.id for task in tasks}) == len(tasks)
        worlds[split] = {repr(task.data) for task in tasks}
        assert {split_of(world_from_json(task.data)) for task in tasks} == {split}
    assert not worlds["train"] & worlds["heldout"]
    assert all(split_of(world_from_json(task.data)) == "train" for task in domain.demonstration_tasks()[:200])
    assert domain.tasks("train")[7] == Quest(num_train=200).tasks("train")[7]


async def test_a_slow_tool_lets_others_go_on() -> None:
    slow, order = make_env(step_seconds=0.2), []

    async def play(env: QuestEnv, name: str) -> None:
        await env.step("look")
        order.append(name)

    await asyncio.gather(play(slow, "slow"), play(make_env(), "quick"))
    assert order == ["quick", "slow"]


async def test_nobody_waits_for_a_slow_tool_to_be_taught() -> None:
    domain = Quest(step_seconds=3600.0)
    task = domain.demonstration_tasks()[0]
    env = domain.make_env(task)
    async with asyncio.timeout(60):
        for command in domain.demonstrate(task, Random(0)):
            result = await env.step(command)
    assert result.done


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"mix": {"middle-lat": 1.0}}, r"env\.args\.mix=.*shares of easy, middle-early"),
        ({"reward": "half"}, r"env\.args\.reward=half: success or progress"),
        ({"step_seconds": -1.0}, r"env\.args\.step_seconds=-1\.0: seconds of each command, 0 to 3600"),
        ({"step_seconds": float("nan")}, r"env\.args\.step_seconds=nan"),
        ({"misstep_rate": 1.5}, r"env\.args\.misstep_rate=1\.5: must be in \[0, 1\]"),
        ({"max_turns": 0}, r"env\.args\.max_turns=0: must be ≥ 1"),
    ],
)
def test_mistakes_in_settings_are_named(args: dict[str, Json], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Quest(**args)  # type: ignore[arg-type]
