import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.comparison.arithmetic import (
    Curve,
    Interval,
    bootstrap_mean,
    common_budget,
    cost_to_reach,
    make_curve,
    mean_curve,
    mean_height,
    paired_differences,
    student_mean,
    truncated,
    value_at,
)

RISING = make_curve([0, 100, 200], [0.2, 0.4, 0.8])

levels = st.floats(0, 1)
curves = st.lists(st.tuples(st.integers(0, 1000), levels), min_size=2, max_size=8, unique_by=lambda p: p[0]).map(
    lambda points: make_curve(*zip(*points, strict=True))
)


def test_measurements_of_equal_cost_are_averaged_and_sorted() -> None:
    curve = make_curve([10, 0, 10], [0.4, 0.1, 0.6])
    assert curve.cost.tolist() == [0, 10]
    assert curve.value.tolist() == [0.1, 0.5]


@pytest.mark.parametrize(("cost", "value"), [([], []), ([0, 1], [0.5, math.nan]), ([0, math.inf], [0, 0])])
def test_what_is_no_curve_is_refused(cost: list[float], value: list[float]) -> None:
    with pytest.raises(ValueError, match="curve"):
        make_curve(cost, value)


def test_a_curve_is_cut_at_the_budget() -> None:
    cut = truncated(RISING, 150)
    assert cut.cost.tolist() == [0, 100, 150]
    assert cut.value.tolist() == pytest.approx([0.2, 0.4, 0.6])
    assert truncated(RISING, 200).cost.tolist() == [0, 100, 200]
    with pytest.raises(ValueError, match="budget 201 is outside the measured 0 to 200"):
        truncated(RISING, 201)


def test_area_and_level() -> None:
    assert mean_height(RISING) == pytest.approx((0.3 * 100 + 0.6 * 100) / 200)
    assert mean_height(make_curve([5], [0.7])) == 0.7
    assert cost_to_reach(RISING, 0.6) == pytest.approx(150)
    assert cost_to_reach(RISING, 0.1) == 0
    assert cost_to_reach(RISING, 0.81) == math.inf
    dip = make_curve([0, 10, 20, 30], [0.0, 0.5, 0.1, 0.9])
    assert cost_to_reach(dip, 0.25) == pytest.approx(5)


@given(curves, st.floats(0, 1), levels)
def test_curves_against_a_fine_grid(curve: Curve, share: float, level: float) -> None:
    budget = float(curve.cost[0] + share * (curve.cost[-1] - curve.cost[0]))
    cut = truncated(curve, budget)
    grid = np.linspace(curve.cost[0], budget, 4001)
    heights = np.interp(grid, curve.cost, curve.value)
    assert mean_height(cut) == pytest.approx(heights.mean(), abs=0.02 if len(cut.cost) > 1 else 0.1)
    reached = cost_to_reach(curve, level)
    if math.isinf(reached):
        assert (curve.value < level).all()
    else:
        assert value_at(curve, reached) == pytest.approx(max(level, curve.value[0]), abs=1e-6)
        before = np.linspace(curve.cost[0], reached, 50)[:-1]
        if reached > curve.cost[0]:
            assert (np.interp(before, curve.cost, curve.value) < level + 1e-9).all()


def test_the_common_budget_is_what_all_have() -> None:
    assert common_budget([RISING, make_curve([0, 120], [0, 1])], 150) == 120
    assert common_budget([RISING], 150) == 150


def test_bootstrap_looks_at_every_resample_of_few_values() -> None:
    values = [0.1, 0.2, 0.6]
    means = [np.mean(pick) for pick in product(values, repeat=3)]
    interval = bootstrap_mean(values, confidence=0.8)
    assert interval.mean == pytest.approx(0.3)
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(means, [0.1, 0.9])))


def test_bootstrap_of_many_values_is_near_the_normal_interval() -> None:
    values = np.random.default_rng(3).normal(0.5, 0.1, size=200)
    interval = bootstrap_mean(values.tolist())
    half = 1.96 * values.std() / math.sqrt(200)
    assert interval.low == pytest.approx(values.mean() - half, abs=0.002)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.002)
    assert bootstrap_mean(values.tolist()) == interval


def test_student_interval_by_hand() -> None:
    # mean 2, sd 1, n 3: t(0.975, 2) = 4.30265
    interval = student_mean([1.0, 2.0, 3.0])
    assert interval.mean == 2.0
    assert interval.high - 2.0 == pytest.approx(4.30265 / math.sqrt(3), abs=1e-4)
    assert not interval.excludes_zero
    assert Interval(0.2, 0.1, 0.3).excludes_zero
    assert not Interval(0.2, math.nan, math.nan).excludes_zero


def test_one_value_tells_nothing_of_its_spread_and_none_is_refused() -> None:
    for estimate in (bootstrap_mean, student_mean):
        assert estimate([0.5]).mean == 0.5
        assert math.isnan(estimate([0.5]).low)
        with pytest.raises(ValueError, match="no value"):
            estimate([])


def test_pairs_are_matched_by_seed() -> None:
    assert paired_differences({2: 0.9, 0: 0.5, 7: 0.1}, {0: 0.25, 2: 0.5, 3: 0.0}) == pytest.approx([0.25, 0.4])


def test_the_mean_curve_stays_within_what_all_cover() -> None:
    mean = mean_curve([RISING, make_curve([50, 150], [0.0, 1.0])], 1000)
    assert mean.cost.tolist() == [50, 100, 150]
    assert mean.value.tolist() == pytest.approx([0.15, 0.45, 0.8])
    apart = mean_curve([make_curve([0, 10], [0.0, 1.0]), make_curve([20, 30], [0.0, 0.5])], 1000)
    assert (apart.cost.tolist(), apart.value.tolist()) == ([20], [0.5])


def test_tokens_to_reach_are_exact_on_curves_with_peaks() -> None:
    """The mean is at .5 from 1,000 to 1,001 only; sixty points over 200,000 lie 3,390 apart and miss it."""
    peak = make_curve([0, 1000, 1001, 1002, 200_000], [0.0, 0.5, 0.5, 0.1, 0.6])
    other = make_curve([0, 500, 200_000], [0.5, 0.5, 0.5])
    assert cost_to_reach(mean_curve([peak, other], 200_000), 0.5) == 1000
    # (.25 at 0, .375 at 500, .5 at 1,000): .4 lies a fifth of the way from 500 to 1,000.
    assert cost_to_reach(mean_curve([peak, other], 200_000), 0.4) == pytest.approx(600)


@given(st.lists(curves, min_size=1, max_size=4), st.floats(0, 1))
def test_the_mean_curve_is_the_mean_at_every_cost(some: list[Curve], share: float) -> None:
    mean = mean_curve(some, math.inf)
    cost = float(mean.cost[0] + share * (mean.cost[-1] - mean.cost[0]))
    assert value_at(mean, cost) == pytest.approx(np.mean([value_at(curve, cost) for curve in some]), abs=1e-6)
