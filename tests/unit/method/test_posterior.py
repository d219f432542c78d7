import json

import numpy as np
import pytest
from scipy import stats

from trace_async.method.allocation import allocate_roots
from trace_async.method.posterior import Estimates, SuccessEstimator, fit_strength
from trace_async.trees.tree import Node, Rollout, RolloutKind, RolloutTree
from trace_async.types import Task, VersionSpan


def tree_of(task_id, rewards, continuations=()):
    """Root rollouts of one turn each, two turns for the first; continuations of its first turn."""
    nodes = [Node(parent=-1, rollout=-1, token_ids=(1,), num_generated=0)]
    rollouts = []
    for index, reward in enumerate([*rewards, *continuations]):
        kind: RolloutKind = "root" if index < len(rewards) else "continuation"
        anchor = 0 if kind == "root" else 1
        length = 2 if not rollouts else 1
        for step in range(length):
            parent = anchor if step == 0 else len(nodes) - 1
            nodes.append(
                Node(
                    parent=parent,
                    rollout=len(rollouts),
                    token_ids=(2,),
                    num_generated=1,
                    logprobs=(0.0,),
                    version_spans=(VersionSpan(0, 0),),
                )
            )
        rollouts.append(Rollout(kind=kind, anchor=anchor, leaf=len(nodes) - 1, reward=reward))
    task = Task(id=task_id, domain="d", kind="k", data={})
    return RolloutTree(task=task, nodes=tuple(nodes), rollouts=tuple(rollouts))


def test_posterior_is_prior_plus_counts():
    estimator = SuccessEstimator(4.0, fit=False, half_life=0)
    estimator.observe([tree_of("seen", [1, 1, 0], continuations=[0, 0])], np.array([0.5]), version=3)
    found = estimator.estimate(["seen", "new"], np.array([0.25, 0.25]), version=9)
    # 4·.25 + 2 and 4·.75 + 1; continuations are chosen by outcome and do not count
    assert found.a.tolist() == [3, 1]
    assert found.b.tolist() == [4, 3]
    assert found.mean.tolist() == pytest.approx([3 / 7, 0.25])
    assert found.strength.tolist() == [7, 4]


def test_old_counts_fade():
    estimator = SuccessEstimator(2.0, fit=False, half_life=4)
    estimator.observe([tree_of("t", [1, 1, 1, 0])], np.array([0.5]), version=0)
    assert estimator.estimate(["t"], np.array([0.5]), version=4).a[0] == pytest.approx(1 + 1.5)
    estimator.observe([tree_of("t", [0, 0])], np.array([0.5]), version=8)
    later = estimator.estimate(["t"], np.array([0.5]), version=8)
    assert (later.a[0], later.b[0]) == pytest.approx((1 + 0.75, 1 + 0.25 + 2))


@pytest.mark.parametrize("true", [1.0, 4.0, 12.0])
def test_strength_is_found_again(true):
    rng = np.random.default_rng(0)
    values = rng.uniform(0.05, 0.95, 3000)
    success = rng.beta(true * values, true * (1 - values))
    hits = rng.binomial(8, success).astype(float)
    assert fit_strength(values, hits, 8 - hits) == pytest.approx(true, rel=0.5)


def test_a_useless_model_gets_little_say():
    rng = np.random.default_rng(1)
    estimator = SuccessEstimator(8.0)
    success = rng.choice([0.02, 0.98], 200)
    trees = [tree_of(f"t{i}", rng.binomial(1, p, 4).astype(float).tolist()) for i, p in enumerate(success)]
    estimator.observe(trees, np.full(200, 0.5), version=0)
    assert estimator.strength <= 0.75
    easy = [i for i in range(200) if success[i] > 0.5]
    found = estimator.estimate([f"t{i}" for i in easy], np.full(len(easy), 0.5), version=0)
    assert found.mean.mean() > 0.9


def test_a_perfect_model_gets_the_word():
    rng = np.random.default_rng(2)
    estimator = SuccessEstimator(1.0)
    success = rng.uniform(0.1, 0.9, 300)
    trees = [tree_of(f"t{i}", rng.binomial(1, p, 6).astype(float).tolist()) for i, p in enumerate(success)]
    estimator.observe(trees, success, version=0)
    assert estimator.strength >= 16


def test_state_goes_through_json():
    estimator = SuccessEstimator(4.0, half_life=4)
    trees = [tree_of(f"t{i}", [1, 0, i % 2]) for i in range(20)]
    estimator.observe(trees, np.linspace(0.1, 0.9, 20), version=2)
    again = SuccessEstimator(4.0, half_life=4)
    again.load_state(json.loads(json.dumps(estimator.state())))
    assert again.strength == estimator.strength
    assert again.counts == estimator.counts
    assert list(again.observed) == list(estimator.observed)


def test_estimates_must_be_posteriors():
    with pytest.raises(ValueError, match="> 0"):
        Estimates(np.array([0.0]), np.array([1.0]))
    with pytest.raises(ValueError, match="equally long"):
        Estimates(np.array([1.0, 1.0]), np.array([1.0]))


def test_measured_outcomes_alone_make_a_posterior_that_is_never_certain():
    found = Estimates.of_outcomes([[1.0, 0.0, 1.0], [0.0], []])
    assert found.a.tolist() == [2.5, 0.5, 0.5]
    assert found.b.tolist() == [1.5, 1.5, 0.5]


def simulated(seed, *, with_counts):
    """Stage 1 `beta` for 50 rounds on 600 prompts of V ≡ .5 and true logits N(0, 2²): strength, coverage of 90 %."""
    rng = np.random.default_rng(seed)
    success = 1 / (1 + np.exp(-rng.normal(0, 2, 600)))
    wins, losses, observed, strength, inside = np.zeros(600), np.zeros(600), [], 4.0, []
    for number in range(50):
        pool = rng.choice(600, 192, replace=False)
        a, b = strength * 0.5 + wins[pool], strength * 0.5 + losses[pool]
        counts = allocate_roots(a / (a + b), 64, max_rollouts=4, strength=a + b)
        some = counts > 1
        chosen, hits = pool[some], rng.binomial(counts[some], success[pool[some]])
        if number >= 25:
            low, high = (stats.beta.ppf(q, a[some], b[some]) for q in (0.05, 0.95))
            inside += ((success[chosen] >= low) & (success[chosen] <= high)).tolist()
        misses = counts[some] - hits
        observed += zip([0.5] * len(chosen), hits, misses, wins[chosen], losses[chosen], strict=True)
        wins[chosen] += hits
        losses[chosen] += misses
        rows = np.array(observed[-512:]).T
        strength = fit_strength(*(rows if with_counts else rows[:3]))
    return strength, np.mean(inside)


def test_choosing_prompts_by_their_counts_does_not_inflate_the_prior():
    """The prior that fits N(0, 2²) logits best has a strength of about 1; blind to the counts, 4 and more come out."""
    found = np.array([simulated(seed, with_counts=True) for seed in range(3)])
    blind = np.array([simulated(seed, with_counts=False) for seed in range(3)])
    assert found[:, 0].max() < 2.1 < 3.9 < blind[:, 0].min()
    assert found[:, 1].mean() > 0.83
    assert blind[:, 1].mean() < found[:, 1].mean() - 0.08


def test_the_estimator_remembers_the_counts_before_each_outcome():
    estimator = SuccessEstimator(4.0, fit=False, half_life=0)
    estimator.observe([tree_of("t", [1, 0])], np.array([0.3]), version=0)
    estimator.observe([tree_of("t", [1, 1, 0])], np.array([0.4]), version=0)
    assert list(estimator.observed) == [(0.3, 1, 1, 0, 0), (0.4, 2, 1, 1, 1)]


def test_what_an_earlier_version_kept_is_refused_in_words():
    state = SuccessEstimator(4.0).state() | {"observed": [[0.5, 1, 1]]}
    with pytest.raises(ValueError, match="earlier version"):
        SuccessEstimator(4.0).load_state(state)
