"""Agents with several conversations: summaries, helpers, votes. One rollout, one outcome, every turn in its context."""

import json
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from envs.agent.domain import Agent
from tests.support.scripted_policy import TOKENIZER, call, grow_tree, says
from trace_async.method.anchors import Anchor
from trace_async.rollout.expansion import Expansion
from trace_async.trees.tree import RolloutTree

MakeDomain = Callable[[str], Agent]


@pytest.fixture
async def make_domain(tmp_path: Path) -> AsyncIterator[MakeDomain]:
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps({"id": name, "keys": ["a", "b"], "answer": "3"}) + "\n" for name in "xy"))
    made = []

    def make(agent: str) -> Agent:
        agents = "tests.support.agents"
        made.append(Agent(tasks=str(path), num_heldout=1, agent=f"{agents}:{agent}", verifier=f"{agents}:right_sum"))
        return made[-1]

    yield make
    for domain in made:
        await domain.close()


def text(tree: RolloutTree, node: int) -> str:
    return TOKENIZER.decode(list(tree.nodes[node].token_ids))


def shape(tree: RolloutTree) -> list[tuple[int, int | None]]:
    return [(node.parent, node.follows) for node in tree.nodes]


async def test_a_history_that_is_summed_up_becomes_a_conversation_of_its_own(make_domain):
    policy = says(call("a"), f"I  go on {call('b')}", call("c"), "3")
    tree = await grow_tree(make_domain("compacting_adder"), policy)
    assert shape(tree) == [(-1, None), (0, None), (1, None), (2, -1), (3, None), (4, None)]
    assert (tree.rollouts[0].reward, tree.failures) == (1.0, {})
    # What the policy saw at its third turn: the new prompt, in which its last turn stands in its own tokens.
    assert policy.prompts[2] == tree.nodes[3].token_ids
    written = tuple(tree.nodes[2].token_ids[: tree.nodes[2].num_generated - 1])
    assert any(policy.prompts[2][start : start + len(written)] == written for start in range(len(policy.prompts[2])))
    assert "turn 1 is over" in text(tree, 3)
    assert policy.prompts[3] == tree.prefix_tokens(4)
    assert tree.num_leaves == (1,) * 6


async def test_a_helper_has_a_conversation_of_its_own_and_the_first_one_goes_on(make_domain):
    policy = says("plan", call("a"), "1", "3")
    tree = await grow_tree(make_domain("delegating_adder"), policy)
    # prompt, plan, the helper's prompt, call, told, and back behind the plan, the last turn.
    assert shape(tree) == [(-1, None), (0, None), (1, -1), (2, None), (3, None), (4, 1), (5, None)]
    assert tree.rollouts[0].reward == 1.0
    assert policy.prompts[1] == tree.nodes[2].token_ids
    assert policy.prompts[2] == tree.prefix_tokens(3)
    assert policy.prompts[3] == tree.prefix_tokens(5)
    assert policy.prompts[3] == (*tree.nodes[0].token_ids, *tree.nodes[1].token_ids, *tree.nodes[5].token_ids)
    assert text(tree, 1) == "plan<|im_end|>"
    assert "the helper says 1" in text(tree, 5)


async def test_the_same_asked_several_times_branches_where_it_was_asked(make_domain):
    policy = says("one", "two", "three", "still one", "still two", "3")
    tree = await grow_tree(make_domain("voting_adder"), policy)
    assert tree.rollouts[0].reward == 1.0
    prompt = tree.nodes[0].token_ids
    assert policy.prompts[:3] == [prompt] * 3
    for number, word in ((3, "one"), (4, "two"), (5, "three")):
        context = TOKENIZER.decode(list(policy.prompts[number]))
        assert f"assistant\n{word}<|im_end|>\n<|im_start|>user\nsure?" in context
    turns = [node for node, record in enumerate(tree.nodes) if record.num_generated]
    assert [tree.prefix_tokens(tree.nodes[node].parent) for node in turns] == policy.prompts


@pytest.mark.parametrize(
    ("agent", "anchor", "turns"),
    [
        ("compacting_adder", 4, (call("a"), call("b"), call("c"), "3", "4", "3")),
        ("compacting_adder", 1, (call("a"), call("b"), "3", call("b"), call("b"), call("c"), call("c"), "3", "3")),
        ("delegating_adder", 3, ("plan", call("a"), "1", "3", "1", "2", "3", "3")),
        ("delegating_adder", 2, ("plan", call("a"), "1", "3", call("b"), call("b"), "1", "2", "3", "3")),
    ],
)
async def test_continuations_go_on_in_the_conversation_in_which_they_stand(make_domain, agent, anchor, turns):
    def plan(anchors: Sequence[Anchor], budget: int) -> np.ndarray:
        return np.array([budget * (one.node == anchor) for one in anchors])

    policy = says(*turns)
    tree = await grow_tree(make_domain(agent), policy, Expansion(plan=plan, per_root=2))
    assert tree.failures == {}
    assert [(rollout.kind, rollout.anchor) for rollout in tree.rollouts[1:]] == [("continuation", anchor)] * 2
    # Every request that the policy saw is the context of a turn in the tree, replayed ones not among them.
    generated = [node for node, record in enumerate(tree.nodes) if record.num_generated]
    assert len(generated) == len(turns)
    contexts = sorted(tree.prefix_tokens(tree.nodes[node].parent) for node in generated)
    assert contexts == sorted(policy.prompts)


async def test_values_are_asked_with_what_the_policy_saw(make_domain):
    asked = []

    async def value(queries):
        asked.extend(queries)
        return [np.arange(len(query.positions)) / 10 + 0.1 for query in queries]

    expansion = Expansion(plan=lambda anchors, budget: np.zeros(len(anchors), dtype=int), per_root=1, value=value)
    tree = await grow_tree(make_domain("delegating_adder"), says("plan", call("a"), "1", "3"), expansion)
    # Continued can be the helper's prompt, its call, and what the first conversation goes on with.
    length = [len(tree.prefix_tokens(node)) for node in range(len(tree.nodes))]
    assert {query.token_ids: query.positions for query in asked} == {
        tree.prefix_tokens(5): (length[5],),
        tree.prefix_tokens(3): (length[2], length[3]),
    }
    assert [tree.nodes[node].value for node in range(1, 7)] == [None, 0.1, 0.2, None, 0.1, None]
