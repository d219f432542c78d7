"""The staleness bound and the ledger."""

from collections.abc import Mapping
from dataclasses import replace

import pytest

from trace_async.run.buffer import TreeBuffer
from trace_async.run.ledger import Ledger
from trace_async.trees.tree import Node, Rollout, RolloutTree
from trace_async.types import LossKind, Task, VersionSpan


def make_tree(name: str, *, version: int, num_roots: int = 2, failures: Mapping[str, int] | None = None) -> RolloutTree:
    finished = num_roots - sum((failures or {}).values())
    nodes = [Node(parent=-1, rollout=-1, token_ids=(1,), num_generated=0)]
    nodes += [
        Node(
            parent=0,
            rollout=r,
            token_ids=(2,),
            num_generated=1,
            logprobs=(-1.0,),
            version_spans=(VersionSpan(0, version),),
        )
        for r in range(finished)
    ]
    return RolloutTree(
        task=Task(id=name, domain="d", kind="k", data={}),
        nodes=tuple(nodes),
        rollouts=tuple(Rollout(kind="root", anchor=0, leaf=r + 1, reward=float(r % 2)) for r in range(finished)),
        policy_version_started=version,
        num_roots_allocated=num_roots,
        failures=failures or {},
    )


def test_an_update_waits_for_what_is_due_and_takes_oldest_first():
    buffer = TreeBuffer(roots_per_update=4, max_staleness=1)
    for ticket in range(3):
        buffer.admit(ticket, 0)
    buffer.admit(3, 1)
    buffer.admit(4, 1)
    buffer.finish(3, make_tree("young a", version=1))
    buffer.finish(0, make_tree("old a", version=0))
    # Version 0: enough has ended, nothing is due yet.
    assert buffer.ready(0, more_to_come=True)
    assert [tree.task.id for tree in buffer.take(0)] == ["old a", "young a"]
    buffer.finish(4, make_tree("young b", version=1))
    buffer.finish(1, make_tree("old b", version=0))
    # Version 1: the tree that began at 0 and still grows is due now.
    assert not buffer.ready(1, more_to_come=False)
    buffer.finish(2, make_tree("old c", version=0))
    assert buffer.ready(1, more_to_come=False)
    assert [tree.task.id for tree in buffer.take(1)] == ["old b", "old c"]
    assert [tree.task.id for tree in buffer.waiting] == ["young b"]


def test_further_roots_of_stage_2_do_not_fill_an_update():
    """An update is M = 4 roots of Stage 1. Of three that a prompt had, Stage 2 bought one."""
    buffer = TreeBuffer(roots_per_update=4, max_staleness=1)
    grown = make_tree("a", version=0, num_roots=3)
    topped_up = replace(grown, rollouts=(*grown.rollouts[:2], replace(grown.rollouts[2], round=1)))
    for ticket, tree in enumerate((topped_up, topped_up)):
        buffer.admit(ticket, 0)
        assert not buffer.ready(0, more_to_come=True)
        buffer.finish(ticket, tree)
    assert buffer.waiting_roots == 4
    assert buffer.ready(0, more_to_come=True)


def test_zero_staleness_waits_for_all_that_grow():
    buffer = TreeBuffer(roots_per_update=4, max_staleness=0)
    buffer.admit(0, 0)
    buffer.admit(1, 0)
    buffer.finish(0, make_tree("a", version=0, num_roots=4))
    assert not buffer.ready(0, more_to_come=False)
    buffer.finish(1, make_tree("b", version=0))
    assert len(buffer.take(0)) == 2


def test_what_a_tree_lost_does_not_count_towards_an_update():
    buffer = TreeBuffer(roots_per_update=4, max_staleness=1)
    buffer.admit(0, 0)
    buffer.admit(1, 0)
    buffer.finish(0, make_tree("half", version=0, num_roots=4, failures={LossKind.ENV: 2}))
    assert not buffer.ready(0, more_to_come=True)
    buffer.finish(1, make_tree("whole", version=0))
    assert buffer.ready(0, more_to_come=True)


def test_an_update_waits_for_the_next_round_while_one_may_still_come():
    buffer = TreeBuffer(roots_per_update=4, max_staleness=1)
    buffer.admit(0, 0)
    buffer.finish(0, make_tree("a", version=0))
    assert not buffer.ready(0, more_to_come=True)
    assert buffer.ready(0, more_to_come=False)


def test_training_on_a_tree_older_than_the_bound_is_refused():
    buffer = TreeBuffer(roots_per_update=2, max_staleness=1)
    buffer.admit(0, 0)
    buffer.finish(0, make_tree("late", version=0))
    with pytest.raises(AssertionError, match="max_staleness=1"):
        buffer.take(2)


def test_the_ledger_adds_up_and_says_where_it_does_not():
    ledger = Ledger()
    ledger.allocate_roots(5)
    ledger.check(waiting=0, in_flight_roots=5)
    tree = make_tree("a", version=0, num_roots=3, failures={LossKind.ENV: 1})
    ledger.arrive(tree)
    ledger.check(waiting=2, in_flight_roots=2)
    ledger.train(tree)
    ledger.lose_tree(2, LossKind.TREE_TIMEOUT)
    ledger.check(waiting=0, in_flight_roots=0)
    assert ledger.failed == {LossKind.ENV: 1, LossKind.TREE_TIMEOUT: 2}
    assert Ledger.from_state(ledger.state()) == ledger
    with pytest.raises(AssertionError, match="5 rollouts allocated"):
        ledger.check(waiting=1, in_flight_roots=0)
