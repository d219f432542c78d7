import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trace_async.tracking.log import METRICS_FILE, Point, point_line, read_metrics, write_metrics


def test_a_line_is_flat_json(tmp_path: Path) -> None:
    assert point_line(Point(3, 1.5, {"train/reward": 0.25, "learner/loss": math.nan})) == (
        '{"step": 3, "time": 1.5, "train/reward": 0.25, "learner/loss": null}\n'
    )


@given(st.lists(st.tuples(st.integers(0, 9), st.dictionaries(st.sampled_from("abc"), st.floats(allow_nan=False)))))
def test_points_come_back(tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[int, dict[str, float]]]) -> None:
    run_dir = tmp_path_factory.mktemp("run")
    points = [Point(step, 12.5, {k: v for k, v in metrics.items() if math.isfinite(v)}) for step, metrics in drawn]
    write_metrics(run_dir, points)
    assert read_metrics(run_dir) == points


def test_what_is_not_finite_comes_back_as_nan(tmp_path: Path) -> None:
    write_metrics(tmp_path, [Point(0, 0.0, {"a": math.inf, "b": math.nan, "c": 1.0})])
    (point,) = read_metrics(tmp_path)
    assert math.isnan(point.metrics["a"])
    assert math.isnan(point.metrics["b"])
    assert point.metrics["c"] == 1.0


def test_an_unfinished_last_line_is_passed_over_and_a_broken_one_named(tmp_path: Path) -> None:
    whole = point_line(Point(1, 1.0, {"a": 2.0}))
    (tmp_path / METRICS_FILE).write_text(whole + whole[:-7])
    assert read_metrics(tmp_path) == [Point(1, 1.0, {"a": 2.0})]
    (tmp_path / METRICS_FILE).write_text(whole + "{}\n" + whole)
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a line of metrics"):
        read_metrics(tmp_path)


def test_a_run_that_has_logged_nothing_has_no_points(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
