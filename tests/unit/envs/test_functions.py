"""Function calling on the simulated services: the tools, user turns, judging by state, generated tasks."""

import json
from copy import deepcopy
from random import Random
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.functions.domain import ConversationEnv, Functions, write_call
from envs.functions.services import TOOLS, ServicesState, ToolError, call_tool
from trace_async.config import ConfigError
from trace_async.env import Demonstrator
from trace_async.policy.small_tokenizer import build_tokenizer
from trace_async.types import StepResult, Task

STATE: ServicesState = {
    "folders": {"desk": ["report", "notes"], "backup": []},
    "tickets": {"t1": {"owner": "ann", "status": "open", "priority": "low"}},
    "flights": {"f1": {"origin": "rome", "goal": "oslo", "fare": "flex"}},
    "booked": [],
    "vehicle": {"doors": "open", "engine": "off", "heating": "low"},
}
BACK_UP = {
    "state": STATE,
    "requests": ['back up the file "report"', 'where is the file "notes" ?'],
    "calls": [[["copy_file", {"file": "report", "to": "backup"}]], [["find_file", {"file": "notes"}]]],
    "misread": [[["move_file", {"file": "report", "to": "backup"}]], []],
}


def env_of(data: dict, **settings: Any) -> ConversationEnv:
    return Functions(num_train=1, num_heldout=1, **settings).make_env(
        Task(id="t", domain="functions", kind="k", data=data)
    )


async def play(env: ConversationEnv, *turns: str) -> list[StepResult]:
    await env.init()
    return [await env.step(turn) for turn in turns]


COPY = write_call("copy_file", {"file": "report", "to": "backup"})
FIND = write_call("find_file", {"file": "notes"})


async def test_an_episode_word_for_word() -> None:
    results = await play(env_of(BACK_UP), COPY, "done", FIND, "it is on the desk")
    assert [[(m.role, m.content) for m in result.messages] for result in results] == [
        [("tool", '"ok"')],
        [("user", 'where is the file "notes" ?')],
        [("tool", '{"folder": "desk"}')],
        [],
    ]
    assert results[-1].reward == 1.0
    assert results[-1].metrics == {"turns": 4.0, "tool_calls": 2.0, "malformed_turns": 0.0}


async def test_wrong_state_missing_reading_call_and_side_effects_get_nothing() -> None:
    move = write_call("move_file", {"file": "report", "to": "backup"})
    delete = write_call("delete_file", {"file": "notes"})
    for turns in ((move, "done", FIND, "done"), (COPY, "done", "done"), (COPY, "done", FIND, delete, "done")):
        assert (await play(env_of(BACK_UP), *turns))[-1].reward == 0.0


async def test_detours_and_several_calls_in_a_turn_are_fine() -> None:
    look = write_call("list_files", {"folder": "desk"})
    results = await play(env_of(BACK_UP), f"first {look}\n{COPY}", "done", FIND, "done")
    assert [m.content for m in results[0].messages] == ['{"files": [ "report", "notes"]}', '"ok"']
    assert results[-1].reward == 1.0


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        (write_call("rm", {}), '{"error": "there is no such tool"}'),
        (write_call("copy_file", {"file": "report"}), '{"error": "argument to is missing"}'),
        (write_call("copy_file", {"file": "report", "to": 3}), '{"error": "argument to must be a text"}'),
        (write_call("start_engine", {"self": "x"}), '{"error": "unknown argument"}'),
        (write_call("copy_file", {"file": "x", "to": "desk"}), '{"error": "no such file"}'),
        ("<tool_call> {} </tool_call>", "error : the tool call has no name ; to act write"),
        ('<tool_call> {"name": "f"', "error : the last tag is not closed ; to act write"),
    ],
)
async def test_what_is_wrong_is_said_and_changes_nothing(turn: str, said: str) -> None:
    env = env_of(BACK_UP)
    assert (await play(env, turn))[0].messages[0].content.startswith(said)
    assert [await env.step(turn) for turn in (COPY, "done", FIND, "done")][-1].reward == 1.0


async def test_a_truncated_turn_is_not_carried_out() -> None:
    result = await env_of(BACK_UP).step(COPY, truncated=True)
    assert "cut at its token limit" in result.messages[0].content


async def test_too_many_turns_end_without_reward() -> None:
    results = await play(env_of(BACK_UP, max_turns=2), FIND, FIND)
    assert [result.done for result in results] == [False, True]
    assert results[-1].reward == 0.0


async def test_observations_are_cut() -> None:
    result = (await play(env_of(BACK_UP, max_observation_chars=12), write_call("list_files", {"folder": "desk"})))[0]
    assert result.messages[0].content == '{"files": [ [ cut ]'


async def test_forks_do_not_see_each_other() -> None:
    env = env_of(BACK_UP)
    await play(env, COPY)
    fork = await env.fork()
    await fork.step(write_call("delete_file", {"file": "report"}))
    rewards = []
    for one in (env, fork):
        for turn in ("done", FIND, "done"):
            result = await one.step(turn)
        rewards.append(result.reward)
    assert rewards == [1.0, 0.0]


@given(
    st.sampled_from([*TOOLS, "rm"]),
    st.dictionaries(
        st.sampled_from(["file", "to", "folder", "ticket", "owner", "flight", "doors", "x"]),
        st.sampled_from(["report", "desk", "backup", "t1", "f1", "locked", "ann", 3]),
        max_size=3,
    ),
)
def test_a_refused_call_leaves_the_state_as_it_was(name: str, arguments: dict) -> None:
    state = deepcopy(STATE)
    try:
        result = call_tool(state, name, arguments)
    except ToolError:
        assert state == STATE
    else:
        assert state == STATE if TOOLS[name].reads else result == "ok"
        json.dumps(result)


@pytest.mark.parametrize("rate", [0.0, 1.0])
async def test_demonstrations_succeed_or_err_as_told(rate: float) -> None:
    domain = Functions(num_train=150, num_heldout=1, misread_rate=rate)
    assert isinstance(domain, Demonstrator)
    tokenizer = build_tokenizer(domain.vocabulary())
    unlisted: set[str] = set()
    rewards: dict[str, list[float | None]] = {"easy": [], "middle": [], "hard": []}
    for task in domain.tasks("train"):
        env = domain.make_env(task)
        text = [(await env.init()).messages[0].content]
        for turn in domain.demonstrate(task, Random(0)):
            result = await env.step(turn)
            text += [turn, *(message.content for message in result.messages)]
        for piece in text:
            unlisted |= {token for token in tokenizer.tokenize(piece) if token.isalpha() and len(token) == 1}
        rewards[task.kind].append(result.reward)
    assert unlisted <= {"a"}
    assert set(rewards["easy"]) == {1.0}
    if rate == 0:
        assert set(rewards["middle"] + rewards["hard"]) == {1.0}
    else:
        assert set(rewards["hard"]) == {0.0}


def test_tasks_are_fixed_by_the_seed() -> None:
    one, two, other = (Functions(seed=s, num_train=50, num_heldout=50) for s in (1, 1, 2))
    assert list(one.tasks("train")) == list(two.tasks("train"))
    assert list(one.tasks("train")) != list(other.tasks("train"))
    states = [cast(dict, task.data)["state"] for split in ("train", "heldout") for task in one.tasks(split)]
    assert len({json.dumps(state) for state in states}) == 100
    few = Functions(seed=1, num_train=3).demonstration_tasks()  # the start policy does not depend on num_train
    assert len(few) == len(one.demonstration_tasks()) > 3
    assert few[2] == one.demonstration_tasks()[2]


async def test_tools_are_shown_as_schemas_when_asked_for() -> None:
    domain = Functions(num_train=1, num_heldout=1, show_tools=True)
    prompt = await domain.make_env(domain.tasks("train")[0]).init()
    assert [message.role for message in prompt.messages] == ["system", "user"]
    assert len(prompt.tools) == len(TOOLS)
    assert prompt.tools[0] == {
        "type": "function",
        "function": {
            "name": "find_file",
            "description": "The folder that holds a file",
            "parameters": {
                "type": "object",
                "properties": {"file": {"type": "string", "description": "name of the file"}},
                "required": ["file"],
            },
        },
    }


def test_unknown_shares_name_the_setting() -> None:
    with pytest.raises(ConfigError, match=r"env\.args\.shares"):
        Functions(shares={"simple": 1})
