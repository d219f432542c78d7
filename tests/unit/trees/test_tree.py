"""Invariants of the rollout tree, on one small tree drawn here.

0 prompt ─┬─ 1 ─┬─ 2 ✓   (root rollout 0: nodes 1, 2)
          │     └─ 4 ✗   (continuation 2 at node 1: node 4)
          └─ 3 ✗         (root rollout 1: node 3)
"""

import pytest

from trace_async.trees.tree import Node, Rollout, RolloutTree
from trace_async.types import Task, VersionSpan

TASK = Task(id="t", domain="d", kind="k", data={})


def node(parent: int, rollout: int, *tokens: int, version: int = 5) -> Node:
    return Node(
        parent=parent,
        rollout=rollout,
        token_ids=tokens,
        num_generated=1,
        logprobs=(-0.5,),
        version_spans=(VersionSpan(0, version),),
    )


PROMPT = Node(parent=-1, rollout=-1, token_ids=(1, 2), num_generated=0)
NODES = (PROMPT, node(0, 0, 3, 4), node(1, 0, 5), node(0, 1, 6), node(1, 2, 7, 8, version=6))
ROLLOUTS = (
    Rollout(kind="root", anchor=0, leaf=2, reward=1.0),
    Rollout(kind="root", anchor=0, leaf=3, reward=0.0),
    Rollout(kind="continuation", anchor=1, leaf=4, reward=0.0),
)
TREE = RolloutTree(task=TASK, nodes=NODES, rollouts=ROLLOUTS, policy_version_started=5)


def test_shape():
    assert TREE.children == ((1, 3), (2, 4), (), (), ())
    assert TREE.depths == (0, 1, 2, 1, 2)
    assert TREE.num_leaves == (3, 2, 1, 1, 1)
    assert TREE.path(4) == (0, 1, 4)
    assert TREE.prefix_tokens(4) == (1, 2, 3, 4, 7, 8)
    assert [TREE.fresh_nodes(r) for r in range(3)] == [(1, 2), (3,), (4,)]
    assert list(TREE.branches()) == [(0, (0, 1, 2)), (1, (0, 3)), (2, (0, 1, 4))]


def test_outcomes_tokens_versions_and_cost():
    assert TREE.leaf_rewards == {2: 1.0, 3: 0.0, 4: 0.0}
    assert TREE.has_both_outcomes
    assert TREE.num_generated_tokens == 4
    assert TREE.num_unique_tokens == 8
    assert TREE.oldest_policy_version == 5
    assert TREE.trajectory_equivalents == 2.5


@pytest.mark.parametrize(
    ("nodes", "rollouts", "message"),
    [
        ((node(0, 0, 3),), ROLLOUTS[:1], "node 0 must be the prompt"),
        ((PROMPT, node(1, 0, 3)), ROLLOUTS[:1], "node 1: parent 1 must come before it"),
        ((PROMPT, node(0, 1, 3)), ROLLOUTS[:1], "node 1: there is no rollout 1"),
        (NODES[:4], (*ROLLOUTS[:1], Rollout(kind="root", anchor=0, leaf=2, reward=0.0)), "must be one chain"),
        (NODES, (*ROLLOUTS[:2], Rollout(kind="root", anchor=1, leaf=4, reward=0.0)), "exactly root rollouts"),
        (
            (PROMPT, node(0, 0, 3), node(1, 1, 4)),
            (
                Rollout(kind="root", anchor=0, leaf=1, reward=1.0),
                Rollout(kind="continuation", anchor=1, leaf=2, reward=0.0),
            ),
            "its last node 1 has children",
        ),
    ],
)
def test_what_is_no_tree_is_refused(nodes, rollouts, message):
    with pytest.raises(ValueError, match=message):
        RolloutTree(task=TASK, nodes=nodes, rollouts=rollouts)


def test_a_node_must_account_for_its_generated_tokens():
    with pytest.raises(ValueError, match="2 generated tokens but 1 log-probabilities"):
        Node(parent=0, rollout=0, token_ids=(1, 2), num_generated=2, logprobs=(-1.0,))
    with pytest.raises(ValueError, match=r"num_generated 3 is not within 0\.\.2"):
        Node(parent=0, rollout=0, token_ids=(1, 2), num_generated=3, logprobs=(-1.0,) * 3)
    with pytest.raises(ValueError, match="version_spans must start at token 0"):
        Node(parent=0, rollout=0, token_ids=(1,), num_generated=1, logprobs=(-1.0,))


def test_a_round_below_zero_is_refused():
    node = Node(parent=0, rollout=0, token_ids=(1,), num_generated=0)
    nodes = (Node(parent=-1, rollout=-1, token_ids=(1,), num_generated=0), node)
    with pytest.raises(ValueError, match="rollout 0: round"):
        RolloutTree(
            task=Task(id="t", domain="d", kind="k", data={}),
            nodes=nodes,
            rollouts=(Rollout(kind="root", anchor=0, leaf=1, reward=1.0, round=-1),),
        )


def test_nodes_of_context_go_on_from_earlier_nodes_of_their_rollout_or_begin_anew():
    def context(follows: int, *token_ids: int, num_generated: int = 0) -> Node:
        return Node(parent=1, rollout=0, token_ids=token_ids, num_generated=num_generated, follows=follows)

    def tree(follows: int) -> RolloutTree:
        turn = Node(parent=0, rollout=0, token_ids=(2,), num_generated=0)
        other = Node(parent=0, rollout=1, token_ids=(5,), num_generated=0)
        last = Node(parent=3, rollout=0, token_ids=(4,), num_generated=0)
        prompt = Node(parent=-1, rollout=-1, token_ids=(1,), num_generated=0)
        rollouts = tuple(Rollout(kind="root", anchor=0, leaf=leaf, reward=1.0) for leaf in (4, 2))
        nodes = (prompt, turn, other, context(follows, 3), last)
        return RolloutTree(task=Task(id="t", domain="d", kind="k", data={}), nodes=nodes, rollouts=rollouts)

    assert tree(-1).prefix_tokens(4) == (3, 4)
    assert tree(0).prefix_tokens(4) == (1, 3, 4)
    assert tree(1).prefix_tokens(4) == (1, 2, 3, 4)
    assert tree(0).path(4) == (0, 1, 3, 4)
    assert tree(-1).token_children[-1] == (0, 3)
    for other in (2, 4):
        with pytest.raises(ValueError, match=f"it follows {other}, which is not earlier in its rollout"):
            tree(other)
    with pytest.raises(ValueError, match="a conversation begins with tokens"):
        context(-1)
    with pytest.raises(ValueError, match="holds nothing that was generated"):
        Node(
            parent=1,
            rollout=0,
            token_ids=(3,),
            num_generated=1,
            logprobs=(0.0,),
            version_spans=(VersionSpan(0, 0),),
            follows=0,
        )
