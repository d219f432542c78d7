"""What the bench of processor time reads from a run's figures."""

import math

import pytest

from scripts.bench.processor_time import share_of_time, training_steps
from trace_async.types import Point


def update(step: int, step_s: float, idle: float) -> Point:
    return Point(step, 0.0, {"train/reward": 0.5, "time/step_s": step_s, "idle/generator_share": idle})


EVALUATION = Point(2, 0.0, {"heldout/success_t1.0": 0.5})


def test_updates_count_and_the_start_policy_but_no_later_evaluation():
    start = Point(0, 0.0, {"heldout/success_t1.0": 0.4})
    assert training_steps([start, update(1, 1.0, 0.0), update(2, 1.0, 0.0), EVALUATION]) == [0, 1, 2]


def test_a_share_is_weighted_with_the_seconds_of_its_update_from_the_second_on():
    points = [update(1, 9.0, 0.9), update(2, 1.0, 0.1), EVALUATION, update(3, 3.0, 0.3)]
    assert share_of_time(points, "idle/generator_share") == pytest.approx((0.1 * 1 + 0.3 * 3) / 4)


def test_a_run_of_one_update_has_no_share():
    assert math.isnan(share_of_time([update(1, 9.0, 0.9)], "idle/generator_share"))
