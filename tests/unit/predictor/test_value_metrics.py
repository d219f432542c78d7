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
    assert ValuedOutcomes(*np.zeros((3, 0))).metrics() == {}
