"""The paper's propositions, and the bias of its estimator, on processes whose success is known exactly."""

import numpy as np
import pytest

from scripts.studies.known_process import KnownProcess, random_process
from scripts.studies.propositions import (
    bias_of,
    by_contrast,
    by_value,
    first_turn_credit,
    mixed_pool,
    squared_gradient_norm,
)
from scripts.studies.selection_bias import expanded_nodes
from trace_async.method.allocation import allocate_roots
from trace_async.method.credit import compute_credit


def coin():
    """One turn, two actions, .25 and .75; they succeed with .2 and .6: V = .05 + .45 = .5."""
    return KnownProcess([np.array([[0.25, 0.75]])], np.array([0.2, 0.6]))


def test_values_and_gradient_by_hand():
    assert coin().values[0] == pytest.approx([0.5])
    # P·π·(V(Ha) − V): .25·(.2 − .5), .75·(.6 − .5)
    assert coin().gradient() == pytest.approx([-0.075, 0.075])
    assert coin().expected_errors() == pytest.approx([0.25, 0.25 * 0.16 + 0.75 * 0.24])


@pytest.mark.parametrize("seed", range(5))
def test_proposition_1_more_of_the_prefix_never_hurts(seed):
    errors = random_process(np.random.default_rng(seed), num_turns=4).expected_errors()
    assert (np.diff(errors) <= 1e-12).all()
    assert errors[-1] < errors[0]


@pytest.mark.parametrize("seed", range(5))
def test_proposition_2_v_times_1_minus_v_is_the_remaining_variation(seed):
    process = random_process(np.random.default_rng(seed), num_turns=4)
    for values, variation in zip(process.values, process.remaining_variation(), strict=True):
        assert variation == pytest.approx(values * (1 - values), abs=1e-12)


def test_proposition_3_active_roots_have_a_larger_squared_gradient():
    rng = np.random.default_rng(0)
    pool = mixed_pool(rng, 48)
    success = np.array([float(process.values[0][0]) for process in pool])
    uniform = np.where(np.arange(48) < 8, 8, 0)
    active = allocate_roots(success, 64, max_rollouts=8)
    norms = [squared_gradient_norm(pool, counts, rng, repeats=30) for counts in (uniform, active)]
    assert norms[1] > 1.3 * norms[0]


def test_root_term_of_trace_is_unbiased_and_of_grpo_short_by_one_mth():
    rng = np.random.default_rng(1)
    process = random_process(rng, num_turns=2)
    truth = process.gradient()
    trees = [process.sample_tree(4, rng) for _ in range(6000)]
    for name, factor in (("trace", 1.0), ("grpo", 0.75)):
        estimates = np.array([process.gradient_estimate(tree, compute_credit(name, tree)) for tree in trees])
        error = np.abs(estimates.mean(axis=0) - factor * truth)
        assert (error <= 4.5 * estimates.std(axis=0) / len(trees) ** 0.5 + 1e-12).all()


def test_branch_term_is_unbiased_though_nodes_are_chosen_by_outcome():
    """The branch term below a chosen first turn has the gradient of V there as its mean, per expanded node."""
    rng = np.random.default_rng(2)
    # turn 1 is forced, turn 2 is the coin; Stage 2 expands turn 1 only where the rollout failed
    process = _forced_then_coin()
    below, count = np.zeros(2), 0
    for _ in range(8000):
        tree = process.sample_tree(1, rng, num_continuations=2, choose=lambda v, r, k: np.where(np.array(r) == 0, k, 0))
        if len(tree.rollouts) > 1:
            # a lone root has advantage 0, so all credit is the branch term's, with weights 1/(1·2)
            below += process.gradient_estimate(tree, compute_credit("trace", tree))[2:4]
            count += 1
    assert below / count == pytest.approx(coin().gradient(), abs=0.015)


def _forced_then_coin():
    """Two actions at turn 1 of which only the first is ever taken; then `coin`."""
    sure = np.array([[1.0, 0.0]])
    return KnownProcess([sure, np.array([[0.25, 0.75], [0.5, 0.5]])], np.array([0.2, 0.6, 0.0, 0.0]))


def test_pooling_what_was_chosen_by_outcome_is_biased_and_fresh_is_not():
    gaps = bias_of(by_contrast, np.random.default_rng(0), num_trees=2000)
    for side, sign in (("low", 1), ("high", -1)):
        for kind in ("chosen_minus_fresh", "pooled_minus_fresh"):
            assert sign * gaps[f"{kind}/{side}"] > 2 * gaps[f"{kind}/{side}_se"]
        assert abs(gaps[f"fresh_minus_fresh/{side}"]) < 3.5 * gaps[f"fresh_minus_fresh/{side}_se"]


def test_choosing_by_value_alone_is_unbiased():
    gaps = bias_of(by_value, np.random.default_rng(0), num_trees=2000)
    for kind in ("chosen_minus_fresh", "pooled_minus_fresh", "fresh_minus_fresh"):
        for side in ("low", "high"):
            assert abs(gaps[f"{kind}/{side}"]) < 3.5 * gaps[f"{kind}/{side}_se"]


def test_pooled_estimators_turn_round_the_order_of_bad_prefixes_and_trace_does_not():
    rng = np.random.default_rng(0)
    trace = [first_turn_credit("trace", value, rng, num_trees=250) for value in (0.0, 0.3, 0.6)]
    assert trace[0] < trace[1] < trace[2]
    rpo = [first_turn_credit("tree_rpo", value, rng, num_trees=250) for value in (0.0, 0.3)]
    assert rpo[0] > rpo[1]


def test_expanded_nodes_by_hand():
    rng = np.random.default_rng(0)
    tree = _forced_then_coin().sample_tree(1, rng, num_continuations=3, choose=lambda v, r, k: np.array([k]))
    passed, *fresh = (rollout.reward for rollout in tree.rollouts)
    nodes = expanded_nodes([tree])
    assert nodes.value == pytest.approx([0.5])
    assert nodes.chosen.tolist() == [passed]
    assert nodes.fresh[0] == pytest.approx(sum(fresh) / 3)
    assert nodes.pooled[0] == pytest.approx((passed + sum(fresh)) / 4)
    assert nodes.split[0] == pytest.approx(fresh[0] - (fresh[1] + fresh[2]) / 2)
    assert expanded_nodes([]).value.shape == (0,)
