"""ρ and s of a process that is known exactly."""

from random import Random

import pytest

from scripts.studies.prefixes import decided_by_depth
from trace_async.trees.tree import Node, Rollout, RolloutTree
from trace_async.types import Task, VersionSpan


def turn(parent: int, rollout: int, generated: int, seen: int = 0) -> Node:
    return Node(
        parent=parent,
        rollout=rollout,
        token_ids=(1,) * (generated + seen),
        num_generated=generated,
        logprobs=(-1.0,) * generated,
        version_spans=(VersionSpan(0, 0),),
    )


def tree(outcomes: list[tuple[float, float]]) -> RolloutTree:
    """For each pair a root rollout of two turns (3 and 1 tokens, 4 seen) and a continuation of one turn after the
    first."""
    nodes = [Node(parent=-1, rollout=-1, token_ids=(0,), num_generated=0)]
    rollouts = []
    for number, (root, _) in enumerate(outcomes):
        nodes += [turn(0, number, 3, seen=4), turn(len(nodes), number, 1)]
        rollouts.append(Rollout(kind="root", anchor=0, leaf=len(nodes) - 1, reward=root))
    for number, (_, continuation) in enumerate(outcomes):
        nodes.append(turn(1 + 2 * number, len(rollouts), 1))
        rollouts.append(Rollout(kind="continuation", anchor=1 + 2 * number, leaf=len(nodes) - 1, reward=continuation))
    return RolloutTree(task=Task(id="t", domain="d", kind="k", data={}), nodes=tuple(nodes), rollouts=tuple(rollouts))


def test_costs_before_the_fork() -> None:
    [found] = decided_by_depth([tree([(1.0, 1.0), (0.0, 0.0)])])
    assert (found.depth, found.pairs, found.success) == (1, 2, 0.5)
    assert (found.share_generated, found.share_tokens, found.share_turns) == (3 / 4, 7 / 8, 1 / 2)


def test_a_prefix_that_decides_everything_has_rho_one_and_one_that_decides_nothing_rho_zero() -> None:
    decided = [(1.0, 1.0), (0.0, 0.0)]
    assert decided_by_depth([tree(decided)])[0].rho == pytest.approx(1.0)
    open_ = [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)]
    assert decided_by_depth([tree(open_)])[0].rho == pytest.approx(0.0)
    assert decided_by_depth([tree(open_)])[0].threshold == pytest.approx(0.0)


def test_rho_within_prompts_of_a_known_process() -> None:
    """V after the first turn is p ± .3: Var V = .09, so ρ = .09 / (p(1−p)); prompts of p = .4 and .6 have .375 both.

    Pooled over prompts the spread of p itself must not count: (.09 + .01)/.25 = .4 would be wrong.
    """
    rng = Random(0)

    def pair(p: float) -> tuple[float, float]:
        value = p + rng.choice((-0.3, 0.3))
        return float(rng.random() < value), float(rng.random() < value)

    trees = [tree([pair(p) for _ in range(6)]) for p in (0.4, 0.6) * 3000]
    [found] = decided_by_depth(trees)
    assert found.rho == pytest.approx(0.375, abs=0.012)
    assert found.threshold == pytest.approx(2 * 0.375 / 1.375, abs=0.013)


def test_depths_taken_together_count_each_root_rollout_once() -> None:
    one = tree([(1.0, 1.0), (0.0, 0.0)])
    again = turn(1, len(one.rollouts), 1)  # a second continuation after the first turn of rollout 0
    more = RolloutTree(
        task=one.task,
        nodes=(*one.nodes, again),
        rollouts=(*one.rollouts, Rollout(kind="continuation", anchor=1, leaf=len(one.nodes), reward=0.0)),
    )
    [found] = decided_by_depth([more], width=4)
    assert (found.depth, found.pairs, found.rho) == (0, 2, pytest.approx(1.0))


def test_outcomes_that_are_all_alike_say_nothing() -> None:
    [found] = decided_by_depth([tree([(1.0, 1.0), (1.0, 1.0)])])
    assert found.rho != found.rho  # nan
    assert decided_by_depth([tree([(1.0, 0.0)])]) == []  # one prefix of a prompt has no variance
