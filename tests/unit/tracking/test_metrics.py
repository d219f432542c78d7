"""Figures of an update and of an evaluation, worked out by hand."""

import pytest

from tests.unit.run.test_buffer import make_tree
from trace_async.tracking.metrics import EvalRollout, eval_metrics, tree_metrics
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


def rollout(reward: float | None, kind: str = "easy-1hop", **metrics: float) -> EvalRollout:
    return EvalRollout(
        task_id="t",
        domain="d",
        kind=kind,
        reward=reward,
        metrics=metrics,
        generated_tokens=5,
        num_turns=2,
        error="" if reward is not None else "EnvError",
    )


def test_eval_metrics_by_kind_and_level():
    rollouts = [rollout(1.0, f1=1.0), rollout(0.0, "middle-2hop"), rollout(1.0, "middle-3hop", f1=0.5), rollout(0.0)]
    metrics = eval_metrics(rollouts, 1.0)
    assert metrics["heldout/success_t1.0"] == 0.5
    assert metrics["heldout/success_t1.0/middle"] == 0.5
    assert metrics["heldout/success_t1.0/middle-3hop"] == 1.0
    assert metrics["heldout/env/f1_t1.0"] == pytest.approx(1.5 / 4)


def test_what_broke_down_is_left_out_and_marked_and_too_much_of_it_leaves_no_average(caplog: pytest.LogCaptureFixture):
    metrics = eval_metrics([rollout(1.0)] * 19 + [rollout(None)], 0.0)
    assert metrics["heldout/success_t0.0"] == 1.0
    assert metrics["heldout/num_tasks_t0.0"] == 19
    assert metrics["heldout/lost_tasks_t0.0"] == 1
    metrics = eval_metrics([rollout(1.0), rollout(None), rollout(1.0), rollout(None)], 0.0)
    assert metrics == {"heldout/num_tasks_t0.0": 2, "heldout/lost_tasks_t0.0": 2}
    assert "2 of 4 rollouts broke down: {'EnvError': 2}" in caplog.text


def test_figures_of_different_sources_never_take_each_others_names():
    """The environment's metrics, its kinds and its domains are all named as figures of ours."""
    names = ("success", "env_success", "turns", "num_tasks", "lost_tasks", "f1", "domain", "success_t1.0")
    rollouts = [
        EvalRollout(
            task_id=str(number),
            domain=("success", "middle")[number],
            kind=("middle", "middle-domain")[number],
            reward=float(number),
            metrics=dict.fromkeys(names, 0.25),
            generated_tokens=4,
            num_turns=2,
        )
        for number in range(2)
    ]
    assert eval_metrics(rollouts, 1.0) == {
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
    names = [next(iter(eval_metrics([rollout(1.0)], temperature))) for temperature in (1.0, 0.96, 0.95, 0.0, 0.7)]
    assert names == [f"heldout/num_tasks_{t}" for t in ("t1.0", "t0.96", "t0.95", "t0.0", "t0.7")]
