"""A run's figures as metrics of Ray, and the Grafana dashboard that draws them."""

import json
import re
from collections.abc import Mapping

import pytest

from actors import gauges
from actors.gauges import SHOWN, Gauges, gauge_name
from tests.support.paths import ROOT


class FakeGauge:
    """Ray's call shape; keeps what was set."""

    values: "dict[str, tuple[float, Mapping[str, str]]]" = {}  # noqa: RUF012

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", name)
        assert description
        assert tag_keys == ("run",)
        self.name = name

    def set(self, value: float, tags: Mapping[str, str]) -> None:
        self.values[self.name] = value, tags


def test_figures_are_set_by_name_with_the_run_and_others_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gauges, "Gauge", FakeGauge)
    monkeypatch.setattr(FakeGauge, "values", {})
    shown = Gauges("mine")
    shown.show(3, {"train/reward": 0.5, "cache/depth_1": 0.9})
    shown.show(3, {"heldout/success_t1.0": 0.25})
    tags = {"run": "mine"}
    assert FakeGauge.values == {
        "trace_async_update": (3.0, tags),
        "trace_async_train_reward": (0.5, tags),
        "trace_async_heldout_success_t1_0": (0.25, tags),
    }


def test_the_dashboard_draws_every_figure_that_is_shown_and_no_other():
    dashboard = json.loads((ROOT / "scripts" / "cluster" / "grafana.json").read_text(encoding="utf-8"))
    drawn = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert sorted(drawn) == sorted(f'ray_{gauge_name(name)}{{run=~"$run"}}' for name in ("update", *SHOWN))
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
