"""Held-out figures, worked out by hand."""

import itertools
import math
from collections.abc import Mapping, Sequence

import pytest

from trace_async.tracking.heldout import heldout_figures, pass_at_k
from trace_async.trees.tree import Node, Rollout, RolloutTree
from trace_async.types import Task, VersionSpan


def tree(
    *rewards: float,
    kind: str = "easy-1hop",
    domain: str = "d",
    lost: int = 0,
    metrics: Mapping[str, float] | None = None,
) -> RolloutTree:
    """A task's held-out rollouts; each has two turns, of which the second follows a node of context."""
    nodes = [Node(parent=-1, rollout=-1, token_ids=(1,), num_generated=0)]
    leaves: list[int] = []
    for r in range(len(rewards)):
        for follows, parent in ((None, 0), (0, len(nodes)), (None, len(nodes) + 1)):
            spoken = follows is None
            nodes.append(
                Node(
                    parent=parent,
                    rollout=r,
                    token_ids=(2,),
                    num_generated=int(spoken),
                    logprobs=(-1.0,) * spoken,
                    version_spans=(VersionSpan(0, 0),) * spoken,
                    follows=follows,
                )
            )
        leaves.append(len(nodes) - 1)
    return RolloutTree(
        task=Task(id="t", domain=domain, kind=kind, data={}),
        nodes=tuple(nodes),
        rollouts=tuple(
            Rollout(kind="root", anchor=0, leaf=leaf, reward=reward, metrics=metrics or {})
            for leaf, reward in zip(leaves, rewards, strict=True)
        ),
        failures={"env_error": lost} if lost else {},
    )


def test_success_by_kind_and_level():
    trees = [
        tree(1.0, metrics={"f1": 1.0}),
        tree(0.0, kind="middle-2hop"),
        tree(1.0, kind="middle-3hop", metrics={"f1": 0.5}),
        tree(0.0),
    ]
    figures = heldout_figures(trees, 1.0, 1)
    assert figures["heldout/success_t1.0"] == 0.5
    assert figures["heldout/success_t1.0/middle"] == 0.5
    assert figures["heldout/success_t1.0/middle-3hop"] == 1.0
    assert figures["heldout/env/f1_t1.0"] == pytest.approx(1.5 / 4)
    assert figures["heldout/turns_t1.0"] == 2  # a node of context is no turn
    assert not any("pass_at" in name for name in figures)


def test_what_broke_down_is_left_out_and_marked_and_too_much_of_it_leaves_no_average(caplog: pytest.LogCaptureFixture):
    figures = heldout_figures([tree(1.0)] * 19 + [tree(lost=1)], 0.0, 1)
    assert figures["heldout/success_t0.0"] == 1.0
    assert figures["heldout/num_tasks_t0.0"] == 19
    assert figures["heldout/lost_tasks_t0.0"] == 1
    figures = heldout_figures([tree(1.0), tree(lost=1), tree(1.0), tree(lost=1)], 0.0, 1)
    assert figures == {"heldout/num_tasks_t0.0": 2, "heldout/lost_tasks_t0.0": 2}
    assert "2 of 4 rollouts broke down: {'env_error': 2}" in caplog.text


def test_figures_of_different_sources_never_take_each_others_names():
    """The environment's metrics, its kinds and its domains are all named as figures of ours."""
    names = ("success", "env_success", "turns", "num_tasks", "lost_tasks", "f1", "domain", "success_t1.0")
    metrics = dict.fromkeys(names, 0.25)
    trees = [
        tree(0.0, kind="middle", domain="success", metrics=metrics),
        tree(1.0, kind="middle-domain", domain="middle", metrics=metrics),
    ]
    assert heldout_figures(trees, 1.0, 1) == {
        "heldout/num_tasks_t1.0": 2,
        "heldout/lost_tasks_t1.0": 0,
        "heldout/success_t1.0": 0.5,
        "heldout/turns_t1.0": 2,
        "heldout/success_t1.0/middle": 0.5,  # the level, with both of its kinds
        "heldout/success_t1.0/middle-domain": 1.0,
        "heldout/domain_t1.0/success": 0.0,
        "heldout/domain_t1.0/middle": 1.0,
        **{f"heldout/env/{name}_t1.0": 0.25 for name in names},
    }


def test_temperatures_that_round_to_the_same_digit_have_figures_of_their_own():
    names = [next(iter(heldout_figures([tree(1.0)], temperature, 1))) for temperature in (1.0, 0.96, 0.95, 0.0, 0.7)]
    assert names == [f"heldout/num_tasks_{t}" for t in ("t1.0", "t0.96", "t0.95", "t0.0", "t0.7")]


def test_pass_at_k_of_four_samples():
    figures = heldout_figures([tree(0, 1, 0, 0), tree(1, 1, 1, 1), tree(0, 0, 0, 0)], 1.0, 4)
    assert figures["heldout/success_t1.0"] == pytest.approx((0.25 + 1 + 0) / 3)
    assert figures["heldout/pass_at_2_t1.0"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert figures["heldout/pass_at_4_t1.0"] == pytest.approx(2 / 3)


def test_a_task_counts_once_however_many_of_its_samples_were_lost_and_not_for_a_k_it_cannot_tell():
    many = [tree(1, 0, 0, 0)] * 9
    figures = heldout_figures([*many, tree(1, 1, lost=2)], 1.0, 4)
    assert figures["heldout/success_t1.0"] == pytest.approx((9 * 0.25 + 1) / 10)
    assert figures["heldout/pass_at_2_t1.0"] == pytest.approx((9 * 0.5 + 1) / 10)
    assert figures["heldout/pass_at_4_t1.0"] == 1.0


def test_a_half_right_answer_does_not_pass():
    figures = heldout_figures([tree(0.5, 0.5)], 1.0, 2)
    assert figures["heldout/success_t1.0"] == 0.5
    assert figures["heldout/pass_at_2_t1.0"] == 0.0


@pytest.mark.parametrize("outcomes", [(0, 0, 1, 0, 1), (1, 1, 1), (0, 0, 0, 0), (1, 0)])
def test_pass_at_k_is_the_share_of_all_choices_of_k_samples_that_hold_a_pass(outcomes: Sequence[int]):
    for k in range(1, len(outcomes) + 1):
        chosen = list(itertools.combinations(outcomes, k))
        assert math.isclose(pass_at_k(len(outcomes), sum(outcomes), k), sum(map(max, chosen)) / len(chosen))
