"""The rule by which a run scales its generators, by hand."""

from pathlib import Path

import pytest

from trace_async.run.scaling import ScalingRule, Size, keep_sizes, kept_sizes, order, ordered


def decisions(rule: ScalingRule, size: int, shares: list[tuple[float, float]]) -> list[int | None]:
    """What the rule wants after each update, given (learner waits, generators idle), at a size that stays."""
    made = [
        rule.decide(size, update, learner_wait=wait, generator_idle=idle)
        for update, (wait, idle) in enumerate(shares, start=1)
    ]
    return [size.num_generators if size else None for size in made]


def test_a_learner_that_waits_for_busy_generators_gets_half_as_many_more():
    # The first update at a size is not looked at; three more are one window.
    waits = [(0.9, 0.0), (0.6, 0.02), (0.5, 0.02), (0.55, 0.02)]
    assert decisions(ScalingRule(1, 8), 1, waits) == [None, None, None, 2]
    assert decisions(ScalingRule(1, 8), 5, waits) == [None, None, None, 8]
    assert decisions(ScalingRule(1, 8), 8, waits) == [None] * 4


def test_generators_that_stand_idle_go():
    idle = [(0.0, 0.7)] * 4
    assert decisions(ScalingRule(1, 8), 4, idle) == [None, None, None, 2]  # 4 · .3 + .5 = 1.7
    assert decisions(ScalingRule(3, 8), 4, idle) == [None, None, None, 3]
    assert decisions(ScalingRule(1, 8), 1, idle) == [None] * 4


@pytest.mark.parametrize("shares", [(0.1, 0.3), (0.9, 0.3), (0.1, 0.0)])
def test_otherwise_nothing_changes(shares: tuple[float, float]):
    assert decisions(ScalingRule(1, 8), 4, [shares] * 10) == [None] * 10


def test_equal_bounds_leave_nothing_to_decide():
    assert decisions(ScalingRule(2, 2), 2, [(0.9, 0.0)] * 9 + [(0.0, 0.9)] * 9) == [None] * 18


def test_a_decision_says_why_and_the_next_needs_a_window_of_its_own():
    rule = ScalingRule(1, 4)
    size = None
    for update in range(1, 5):
        size = rule.decide(1, update, learner_wait=0.5, generator_idle=0.0)
    assert size == Size(
        num_generators=2, reason="the learner waited 50% of the time and the generators were idle 0%", update=4
    )
    assert decisions(rule, 2, [(0.5, 0.0)] * 3) == [None, None, None]


def test_orders_and_sizes_are_kept_in_the_runs_folder(tmp_path: Path):
    assert (ordered(tmp_path), kept_sizes(tmp_path)) == (None, [])
    order(tmp_path, 3)
    assert ordered(tmp_path) == 3
    (tmp_path / "scale.json").write_text("{by hand")
    assert ordered(tmp_path) is None
    sizes = [Size(num_generators=2, reason="asked for", update=7)]
    keep_sizes(tmp_path, sizes)
    assert kept_sizes(tmp_path) == sizes
