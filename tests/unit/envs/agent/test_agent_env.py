"""Agents that know nothing of training, run through the endpoint: trees, forks by replay, failures."""

import json
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from random import Random

import numpy as np
import pytest

from envs.agent.domain import Agent
from envs.agent.example import Follow
from tests.support.paths import ROOT
from tests.support.scripted_policy import TOKENIZER, ScriptedPolicy, call, grow_tree, says
from trace_async.config import ConfigError
from trace_async.method.anchors import Anchor
from trace_async.rollout.expansion import Expansion
from trace_async.rollout.guard import EnvLimits
from trace_async.trees.tree import ROOT as PROMPT
from trace_async.trees.tree import RolloutTree
from trace_async.types import Json, Task

AGENTS = "tests.support.agents"
ROWS = [{"id": "ab", "keys": ["a", "b"], "answer": "3"}, {"id": "c", "keys": ["c"], "answer": "3"}]

MakeDomain = Callable[..., Agent]


@pytest.fixture
async def make_domain(tmp_path: Path) -> AsyncIterator[MakeDomain]:
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    made = []

    def make(agent: str = "adder", **changes) -> Agent:
        args = {"agent": f"{AGENTS}:{agent}" if agent else ""} | changes
        made.append(Agent(tasks=str(path), num_heldout=1, verifier=f"{AGENTS}:right_sum", **args))
        return made[-1]

    yield make
    for domain in made:
        await domain.close()


def two_after(node: int):
    def plan(anchors: Sequence[Anchor], budget: int) -> np.ndarray:
        return np.array([budget * (anchor.node == node) for anchor in anchors])

    return Expansion(plan=plan, per_root=2)


async def grow(domain: Agent, policy: ScriptedPolicy, expansion: Expansion | None = None, **changes) -> RolloutTree:
    return await grow_tree(domain, policy, expansion, **changes)


def text(tree: RolloutTree, node: int) -> str:
    return TOKENIZER.decode(list(tree.nodes[node].token_ids))


async def test_an_agent_is_a_chain_of_turns_with_the_tools_in_its_prompt(make_domain):
    policy = says(call("a"), f"and\n{call('b')}", "3")
    tree = await grow(make_domain(), policy)
    assert [(r.kind, r.reward, r.metrics) for r in tree.rollouts] == [("root", 1.0, {"requests": 3.0})]
    assert [node.parent for node in tree.nodes] == [-1, 0, 1, 2]
    prompt = text(tree, 0)
    assert prompt.startswith("<|im_start|>system\nYou add numbers.")
    assert '"name": "lookup"' in prompt
    assert prompt.endswith("<|im_start|>user\nsum of a b<|im_end|>\n<|im_start|>assistant\n")
    observation = "\n<|im_start|>user\n<tool_response>\n1\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    assert text(tree, 1) == call("a") + "<|im_end|>" + observation
    assert text(tree, 3) == "3<|im_end|>"
    # Each request's context is the former one and what the node added: nothing was tokenised a second time.
    assert policy.prompts[1] == tree.nodes[0].token_ids + tree.nodes[1].token_ids
    assert policy.prompts[2] == policy.prompts[1] + tree.nodes[2].token_ids


@pytest.mark.parametrize("agent", ["untidy_adder", "retelling_adder"])
async def test_what_the_policy_wrote_stays_in_its_tokens_whatever_the_agent_makes_of_it(make_domain, agent: str):
    odd = '<tool_call>\n{"name":   "lookup",\n "arguments": {"key":"a"}}\n</tool_call>'
    policy = says(f"I think  so {odd}", call("b"), "3")
    tree = await grow(make_domain(agent), policy)
    assert tree.rollouts[0].reward == 1.0
    assert policy.prompts[2] == tree.prefix_tokens(2)
    assert text(tree, 1).startswith(f"I think  so {odd}<|im_end|>")


async def test_a_continuation_is_a_fresh_run_of_the_agent_answered_from_the_record(make_domain):
    policy = says(call("a"), call("b"), "3", "4", call("c"), "3")
    tree = await grow(make_domain(), policy, two_after(2))
    by_anchor = [(rollout.kind, rollout.anchor) for rollout in tree.rollouts]
    assert by_anchor == [("root", PROMPT), ("continuation", 2), ("continuation", 2)]
    assert sorted(rollout.reward for rollout in tree.rollouts) == [0.0, 1.0, 1.0]
    assert tree.failures == {}
    # Six turns were generated: replayed calls cost none, and both continuations go on from the very tokens of turn 2.
    assert len(policy.prompts) == 6
    assert policy.prompts[3] == policy.prompts[4] == tree.prefix_tokens(2)


async def test_a_tool_that_is_not_deterministic_makes_the_fork_diverge(make_domain):
    policy = says(call("a"), call("b"), "3")
    tree = await grow(make_domain("random_adder"), policy, two_after(2), max_retries=3)
    assert tree.failures == {"replay_diverged": 2}
    assert [rollout.kind for rollout in tree.rollouts] == ["root"]
    assert len(policy.prompts) == 3


async def test_plain_functions_and_commands_are_agents_too(make_domain):
    command = {"agent": "", "command": [sys.executable, "-m", AGENTS], "cwd": str(ROOT)}
    for changes in ({"agent": "plain_adder"}, command):
        policy = says(call("a"), call("b"), "3", call("b"), "4", "3")
        tree = await grow(make_domain(**changes), policy, two_after(1))
        assert [rollout.kind for rollout in tree.rollouts] == ["root", "continuation", "continuation"]
        assert sorted(rollout.reward for rollout in tree.rollouts) == [0.0, 1.0, 1.0]


async def test_an_agent_stays_in_its_event_loop_where_other_environments_get_threads(make_domain):
    for agent in ("adder", "plain_adder"):
        policy = says(call("a"), call("b"), "3", call("b"), "4", "3")
        tree = await grow(make_domain(agent), policy, two_after(1), env_limits=EnvLimits(blocking=True))
        assert tree.failures == {}, tree.faults
        assert sorted(rollout.reward for rollout in tree.rollouts) == [0.0, 1.0, 1.0]


async def test_an_agent_that_goes_on_for_ever_ends_without_reward(make_domain):
    tree = await grow(make_domain(max_turns=4), ScriptedPolicy(lambda _: call("a")))
    assert tree.rollouts[0].reward == 0.0
    assert tree.rollouts[0].metrics == {"requests": 4.0, "max_turns_reached": 1.0}


async def test_an_agent_that_does_not_answer_is_a_failure_and_names_the_setting(make_domain, caplog):
    tree = await grow(make_domain("sleeper", turn_timeout_s=0.2), says())
    assert tree.failures == {"env_timeout": 1}
    assert "env.args.turn_timeout_s=0.2" in caplog.text


async def test_the_predictor_sees_prompts_without_starting_agents_again(make_domain):
    domain = make_domain()
    task = domain.tasks("train")[0]
    prompts = []
    for _ in range(2):
        env = domain.make_env(task)
        prompts.append(await env.init())
        await env.close()
    assert prompts[0] == prompts[1]
    assert env._session is None
    env = domain.make_env(task)
    await env.init()
    assert (await env.step(call("a"))).messages[0].content == "1"
    await env.close()


def test_settings_that_cannot_be_are_refused_in_words(make_domain, tmp_path: Path):
    for changes, words in (
        ({"agent": ""}, "give either agent .* or command"),
        ({"command": ["x"]}, "give either agent .* or command"),
        ({"agent": "nobody"}, "env.args.agent=.*:nobody: cannot be found"),
        ({"max_turns": 0}, "env.args.max_turns=0: must be ≥ 1"),
        ({"turn_timeout_s": 0}, "env.args.turn_timeout_s=0: must be > 0"),
        ({"agent": "", "command": "python x.py"}, "a list of words"),
        ({"host": "0.0.0.0"}, "env.args.host=0.0.0.0: beyond loopback also name env.args.advertise"),
    ):
        with pytest.raises(ConfigError, match=words):
            make_domain(**changes)


@pytest.mark.parametrize(
    ("final_tool", "last"),
    [
        ("", "at p4"),
        ("final_answer", '<tool_call> {"name": "final_answer", "arguments": {"answer": "p4"}} </tool_call>'),
    ],
)
def test_the_example_demonstrates_answers_in_the_form_that_the_framework_takes(final_tool: str, last: str):
    signs: dict[str, Json] = {"p1": "p2", "p2": "p4"}
    task = Task(id="t", domain="follow", kind="2-hops", data={"start": "p1", "hops": 2, "signs": signs, "answer": "p4"})
    domain = Follow(final_tool=final_tool, miscount_rate=0.0)
    turns = domain.demonstrate(task, Random(0))
    assert turns == [
        '<tool_call> {"name": "look", "arguments": {"place": "p1"}} </tool_call>',
        '<tool_call> {"name": "look", "arguments": {"place": "p2"}} </tool_call>',
        last,
    ]
    assert ("final_answer" in " ".join(domain.vocabulary())) == bool(final_tool)
