import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.method.test_posterior import tree_of
from trace_async.predictor.metrics import ValuedOutcomes, auc, brier, calibration_error, root_outcomes


def test_by_hand():
    values, outcomes = np.array([0.9, 0.4, 0.4, 0.1]), np.array([1.0, 1.0, 0.0, 0.0])
    assert brier(values, outcomes) == pytest.approx((0.01 + 0.36 + 0.16 + 0.01) / 4)
    # pairs: .9 beats both; .4 ties one and beats one: 3.5 of 4
    assert auc(values, outcomes) == pytest.approx(3.5 / 4)
    # bins .9: gap .1 of 1; .4: |.8 − 1| of 2; .1: .1 of 1
    assert calibration_error(values, outcomes) == pytest.approx((0.1 + 0.2 + 0.1) / 4)
    assert np.isnan(auc(values, np.ones(4)))


@given(st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.5, 0.8]), st.booleans()), min_size=1, max_size=30))
def test_auc_equals_counting_pairs(rows):
    values, outcomes = np.array([v for v, _ in rows]), np.array([float(o) for _, o in rows])
    wins = [(v > w) + (v == w) / 2 for v, o in rows for w, p in rows if o and not p]
    assert auc(values, outcomes) == pytest.approx(np.mean(wins) if wins else np.nan, nan_ok=True)


def test_root_outcomes_leaves_out_last_turns_and_continuations():
    tree = tree_of("t", [1.0, 0.0], continuations=[1.0])
    found = root_outcomes([tree], [np.array([0.4, 0.7, 0.99, 0.01, 0.5])])
    # the prompt for both rollouts, the first turn of rollout 0
    assert found.values.tolist() == [0.4, 0.7, 0.4]
    assert found.outcomes.tolist() == [1, 1, 0]
    assert found.depths.tolist() == [0, 1, 0]
    metrics = found.metrics()
    assert metrics["brier"] == pytest.approx((0.36 + 0.09 + 0.16) / 3)
    assert metrics["brier/depth_0"] == pytest.approx((0.36 + 0.16) / 2)
    assert metrics["auc/depth_0"] == 0.5
    assert "auc/depth_1" not in metrics
    assert ValuedOutcomes(*np.zeros((4, 0))).metrics() == {}


def test_auc_within_prompts_and_between_them_by_hand():
    # depth, prompt, value, outcome
    rows = [
        (0, 0, 0.0, 1.0),  # a prompt's own value says nothing of prefixes
        (1, 0, 0.9, 1.0),
        (1, 0, 0.2, 0.0),
        (1, 1, 0.3, 1.0),
        (1, 1, 0.6, 0.0),
        (2, 1, 0.8, 1.0),  # alone at its depth: no pair
    ]
    depths, prompts, values, outcomes = np.array(rows).T
    metrics = ValuedOutcomes(values, outcomes, depths, prompts).metrics()
    # within: .9 > .2 won, .3 < .6 lost; between: .9 > .6 won, .3 > .2 won
    assert (metrics["auc_within"], metrics["pairs_within"]) == (0.5, 2)
    assert (metrics["auc_between"], metrics["pairs_between"]) == (1.0, 2)
    # all prefixes together: the success of depth 2 meets both failures, so 5 of 6 pairs are won
    assert metrics["auc_prefix"] == pytest.approx(5 / 6)
    assert metrics["brier_base/depth_1"] == 0.25


def test_a_model_that_only_knows_prompts_is_a_coin_within_them():
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(40.0), 4)
    chance = np.where(prompts % 2, 0.8, 0.2)
    outcomes = (rng.random(160) < chance).astype(float)
    metrics = ValuedOutcomes(chance, outcomes, np.ones(160), prompts).metrics()
    assert metrics["auc_within"] == 0.5
    assert metrics["auc_between"] > 0.7
    assert metrics["auc_prefix"] == metrics["auc/depth_1"]
