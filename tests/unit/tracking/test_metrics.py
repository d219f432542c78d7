"""Figures of an update and of an evaluation, worked out by hand."""

import pytest

from tests.unit.run.test_buffer import make_tree
from trace_async.tracking.metrics import tree_metrics
from trace_async.trees.tree import Node, Rollout, RolloutTree
from trace_async.types import Task, VersionSpan


def turn(parent: int, rollout: int, *, prompt: int, cached: int) -> Node:
    return Node(
        parent=parent,
        rollout=rollout,
        token_ids=(4, 5, 6),
        num_generated=2,
        logprobs=(-1.0, -1.0),
        version_spans=(VersionSpan(0, 1),),
        prompt_tokens=prompt,
        cached_tokens=cached,
    )


def test_tree_metrics_of_one_mixed_and_one_agreeing_prompt():
    mixed = RolloutTree(
        task=Task(id="a", domain="d", kind="middle-2hop", data={}),
        nodes=(
            Node(parent=-1, rollout=-1, token_ids=(1, 2), num_generated=0),
            turn(0, 0, prompt=10, cached=0),
            turn(1, 0, prompt=20, cached=15),
            turn(1, 1, prompt=20, cached=19),
        ),
        rollouts=(
            Rollout(kind="root", anchor=0, leaf=2, reward=0.0),
            Rollout(kind="continuation", anchor=1, leaf=3, reward=1.0),
        ),
        policy_version_started=1,
        num_roots_allocated=1,
        num_continuations_allocated=1,
    )
    agreeing = make_tree("b", version=2, num_roots=1)
    metrics = tree_metrics([mixed, agreeing], policy_version=2)
    assert metrics["train/effective_ratio"] == 0.5
    assert metrics["train/prompts_both_outcomes"] == 1
    assert metrics["train/prompts_both_outcomes/middle"] == 1
    assert metrics["train/reward"] == 0.0  # root rollouts only: 0 and 0
    assert metrics["budget/roots"] == 2
    assert metrics["budget/continuations"] == 1
    assert metrics["budget/trajectory_equivalents"] == 2.5
    assert metrics["train/staleness_mean"] == 0.5
    assert metrics["train/staleness_max"] == 1
    assert metrics["tokens/generated"] == 2 + 2 + 2 + 1
    assert metrics["cache/depth_2"] == pytest.approx(34 / 40)
    assert metrics["tokens/cached_share"] == pytest.approx(34 / 50)
