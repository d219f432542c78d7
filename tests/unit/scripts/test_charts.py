import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.comparison.arithmetic import make_curve
from scripts.comparison.charts import Axis, Series, line_chart, ticks


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.23, 0.61, [0.2, 0.3, 0.4, 0.5, 0.6, 0.7]),
        (0, 200_000, [0, 50_000, 100_000, 150_000, 200_000]),
        (3, 3, [1.5, 2, 2.5, 3, 3.5, 4, 4.5]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == expected


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_enclose_what_is_shown(low: float, width: float) -> None:
    found = ticks(low, low + width)
    steps = np.diff(found)
    assert 2 <= len(found) <= 9
    assert found[0] <= low + 1e-6 * width
    assert found[-1] >= low + width * (1 - 1e-6)
    assert np.allclose(steps, steps[0], rtol=1e-6)


def test_a_chart_is_whole_svg_with_a_line_for_each_curve() -> None:
    rising, falling = make_curve([0, 100], [0.0, 1.0]), make_curve([0, 50], [1.0, 0.5])
    lines = [Series("a <b> & c", 0, rising, [rising, rising]), Series("late", 9, falling)]
    root = ElementTree.fromstring(line_chart(lines, Axis("tokens"), Axis("success", percent=True)))
    paths = [path.attrib for path in root.iter("{http://www.w3.org/2000/svg}path") if path.get("fill") == "none"]
    assert [path["stroke-width"] for path in paths] == ["1", "1", "2.5", "2.5"]
    texts = ["".join(text.itertext()) for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"a <b> & c 100%", "late 50%", "0", "100", "0%", "100%", "tokens", "success"} <= set(texts)
    # The curve from (0, 0) to (100, 1) runs from the lower left corner of the frame to its upper right one.
    start, end = re.fullmatch(r"M(.+)L(.+)", paths[2]["d"]).groups()
    assert (start, end) == ("62.0 334.0", "650.0 16.0")
    assert "stroke-dasharray" in paths[3]
    assert "stroke-dasharray" not in paths[2]


def test_names_do_not_overlap() -> None:
    lines = [Series(f"m{i}", i, make_curve([0, 1], [0.0, 0.5 + i * 1e-4])) for i in range(10)]
    root = ElementTree.fromstring(line_chart(lines, Axis("x"), Axis("y")))
    labels = [t for t in root.iter("{http://www.w3.org/2000/svg}text") if (t.text or "").startswith("m")]
    heights = sorted(float(label.attrib["y"]) for label in labels)
    assert len(heights) == 10
    assert min(np.diff(heights)) >= 15.9


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        line_chart([], Axis("x"), Axis("y"))
