"""A tree that was pickled is equal to what it was, bit by bit, and small."""

import pickle
import random
from dataclasses import asdict, replace

import numpy as np
import pytest

from tests.support.random_trees import random_tree
from trace_async.trees.packed import pack_nodes
from trace_async.trees.tree import Fault, Node, Rollout, RolloutTree
from trace_async.types import HiddenState, Task, VersionSpan


def sent(tree: RolloutTree) -> RolloutTree:
    return pickle.loads(pickle.dumps(tree, protocol=5))


@pytest.mark.parametrize("seed", range(30))
def test_any_tree_arrives_as_it_was(seed: int):
    rng = random.Random(seed)
    tree = random_tree(rng, conversations=0.3)
    tree = replace(tree, nodes=tuple(replace(node, seconds=rng.random()) for node in tree.nodes))
    found = sent(tree)
    assert found == tree
    assert list(map(asdict, found.nodes)) == list(map(asdict, tree.nodes))  # seconds too, which == leaves out
    assert all(type(token) is int for node in found.nodes for token in node.token_ids)
    assert all(type(logprob) is float for node in found.nodes for logprob in node.logprobs)


def test_every_field_arrives_and_what_was_worked_out_from_them_does_not():
    node = Node(
        parent=0,
        rollout=0,
        token_ids=(1, 2, 3),
        num_generated=2,
        logprobs=(-0.1, -1e-300),  # no float32 holds these
        version_spans=(VersionSpan(0, 4), VersionSpan(1, 5)),
        value=0.25,
        prompt_tokens=7,
        cached_tokens=6,
        seconds=1.5,
    )
    context = Node(parent=1, rollout=0, token_ids=(9,), num_generated=0, follows=-1)
    tree = RolloutTree(
        task=Task(id="t", domain="d", kind="k", data={"a": [1, None]}),
        nodes=(Node(parent=-1, rollout=-1, token_ids=(5,), num_generated=0, value=0.0), node, context),
        rollouts=(Rollout(kind="root", anchor=0, leaf=2, reward=0.5, metrics={"f1": 0.25}),),
        policy_version_started=4,
        num_roots_allocated=2,
        num_continuations_allocated=1,
        failures={"env_error": 1},
        faults={"step.env": Fault(3, "words")},
        states={1: HiddenState(4, 3, b"1234")},
    )
    assert tree.num_leaves == (1, 1, 1)
    found = sent(tree)
    assert found == tree
    assert found.nodes[1].seconds == 1.5  # not compared by ==
    assert found.states == tree.states  # not compared by ==
    assert "num_leaves" not in vars(found)


def test_log_probabilities_that_float32_holds_take_four_bytes_and_others_eight():
    short = replace(random_tree(random.Random(0)).nodes[1], token_ids=(1, 2), num_generated=2, logprobs=(-0.5, -1.25))
    assert pack_nodes([short]).logprobs.dtype == np.float32
    assert pack_nodes([replace(short, logprobs=(-0.5, -0.1))]).logprobs.dtype == np.float64
    with pytest.raises(OverflowError):
        pack_nodes([replace(short, token_ids=(1, 2**31))])


def test_a_long_tree_takes_less_than_nine_bytes_a_generated_token():
    tokens = tuple(range(4096))
    logprobs = tuple(float(np.float32(-0.001 * token)) for token in tokens)
    spans = (VersionSpan(0, 0),)
    turn = Node(parent=0, rollout=0, token_ids=tokens, num_generated=4096, logprobs=logprobs, version_spans=spans)
    tree = RolloutTree(
        task=Task(id="t", domain="d", kind="k", data={}),
        nodes=(Node(parent=-1, rollout=-1, token_ids=(1,), num_generated=0), turn),
        rollouts=(Rollout(kind="root", anchor=0, leaf=1, reward=1.0),),
    )
    assert len(pickle.dumps(tree, protocol=5)) < 9 * 4096
