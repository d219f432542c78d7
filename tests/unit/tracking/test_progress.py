import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from trace_async.printable import printable
from trace_async.tracking.progress import Progress, sparkline


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


METRICS = {
    "train/reward": 0.4,
    "train/effective_ratio": 0.5625,
    "train/prompts_both_outcomes": 18.0,
    "train/staleness_mean": 0.5,
    "train/staleness_max": 1.0,
    "tokens/generated_total": 6000.0,
    "learner/trained_tokens": 2500.0,
    "tokens/cached_share": 0.75,
    "time/step_s": 4.0,
    "time/wait_for_trees_s": 3.0,
    "time/update_s": 1.0,
}


def plain(**options: Any) -> tuple[Progress, io.StringIO, Clock]:
    out, clock = io.StringIO(), Clock()
    return Progress(40, console=Console(file=out, width=60), clock=clock, **options), out, clock


def test_without_a_terminal_each_update_is_one_line() -> None:
    progress, out, clock = plain()
    with progress:
        progress.message("policy: a\x1b[31mb")
        clock.now += 9.0
        progress.update(0, {"heldout/success_t1.0": 0.25, "heldout/success_t0.0": 0.75, "time/eval_s": 9.0})
        clock.now += 2.0
        progress.update(1, METRICS)
        clock.now += 4.0
        progress.update(2, {**METRICS, "tokens/generated_total": 12_000.0})
        clock.now += 9.0
        progress.update(2, {"heldout/success_t1.0": 0.5})
        clock.now += 3.0
        progress.update(3, {"train/num_prompts": 4.0})
    assert out.getvalue().splitlines() == [
        "policy: a\\x1b[31mb",
        "update 0/40  held-out t=1 0.250   greedy 0.750",
        "update 1/40  success 0.40  effective 0.56 (18)  staleness 0.5/1  6000 tokens (1500/s)"
        "  heldout t=1 0.250 greedy 0.750  left 2m45s",
        "update 2/40  success 0.40  effective 0.56 (18)  staleness 0.5/1  12.0k tokens (1500/s)"
        "  heldout t=1 0.250 greedy 0.750  left 2m41s",
        "update 2/40  held-out t=1 0.250 → 0.500   greedy 0.750",
        "update 3/40  success –  effective – (–)  staleness –/–  12.0k tokens (1091/s)"
        "  heldout t=1 0.500 greedy 0.750  left 2m25s",
    ]


def test_the_token_budget_can_end_the_run_first() -> None:
    progress, _, clock = plain(token_budget=30_000, tokens_before=12_000, first_update=2)
    assert progress.seconds_left() is None
    with progress:
        progress.recall(0, {"heldout/success_t1.0": 0.25, "time/eval_s": 7.0})
        clock.now += 5.0
        progress.update(3, {**METRICS, "tokens/generated_total": 18_000.0})
    assert progress.seconds_left() == pytest.approx((30_000 - 18_000) / 6_000 * 4.0 + 7.0)


def test_nothing_is_foretold_before_an_update_and_an_evaluation_were_seen() -> None:
    progress, _, clock = plain()
    progress.phase(["policy"])
    assert progress.seconds_left() is None
    progress.phase(["eval"])
    progress.update(0, {"heldout/success_t1.0": 0.25, "time/eval_s": 30.0})
    assert progress.seconds_left() is None
    clock.now += 50.0
    progress.update(1, METRICS)
    assert progress.seconds_left() == pytest.approx(39 * 4.0 + 30.0)
    unevaluated, _, _ = plain()
    unevaluated.update(1, METRICS)
    assert unevaluated.seconds_left() is None


def test_what_takes_longer_than_usual_takes_nothing_from_what_follows() -> None:
    progress, _, clock = plain()
    progress.update(0, {"heldout/success_t1.0": 0.25, "time/eval_s": 30.0})
    progress.update(38, METRICS)
    clock.now += 9.0  # the 39th update usually takes 4 s
    assert progress.seconds_left() == pytest.approx(4.0 + 30.0)
    progress.update(40, METRICS)
    clock.now += 30.0
    assert progress.seconds_left() == pytest.approx(0.0)
    clock.now += 1.0  # the last evaluation is the last thing, and late
    assert progress.seconds_left() is None
    progress.update(40, {"heldout/success_t1.0": 0.25, "time/eval_s": 31.0})
    clock.now += 5.0
    assert progress.seconds_left() == pytest.approx(0.0)


def test_a_resumed_run_knows_the_time_left_from_its_earlier_session() -> None:
    progress, out, clock = plain(first_update=2, tokens_before=12_000)
    for step, metrics in ((0, {"heldout/success_t1.0": 0.25, "time/eval_s": 30.0}), (1, METRICS), (2, METRICS)):
        progress.recall(step, metrics)
    assert out.getvalue() == ""
    progress.phase(["start"])
    clock.now += 100.0
    assert progress.seconds_left() is None  # how long the actors take is not known
    progress.phase(["stage1"])
    clock.now += 1.0
    assert progress.seconds_left() == pytest.approx(38 * 4.0 + 30.0 - 1.0)


def test_the_time_left_has_the_evaluations_that_training_waits_for() -> None:
    progress, _, clock = plain(eval_every=10)
    evaluated = {"heldout/success_t1.0": 0.25, "time/eval_s": 30.0}
    progress.update(0, evaluated)
    progress.update(1, METRICS)
    # 39 updates of 4 s; evaluations after the 10th, 20th, 30th and 40th, which is the last.
    assert progress.seconds_left() == pytest.approx(39 * 4.0 + 4 * 30.0)
    clock.now += 3.0
    assert progress.seconds_left() == pytest.approx(39 * 4.0 + 4 * 30.0 - 3.0)
    progress.update(40, METRICS)
    assert progress.seconds_left() == pytest.approx(30.0)
    progress.update(40, evaluated)
    assert progress.seconds_left() == pytest.approx(0.0)


def test_an_evaluation_beside_training_takes_no_time_of_its_own_but_the_last_does() -> None:
    progress, _, _ = plain()
    progress.update(0, {"heldout/success_t1.0": 0.25, "time/eval_s": 30.0})
    progress.update(1, METRICS)
    assert progress.seconds_left() == pytest.approx(39 * 4.0 + 30.0)


def test_without_a_terminal_what_takes_long_is_told_when_it_begins() -> None:
    progress, out, clock = plain()
    progress.phase(["policy"])
    progress.step("step 50/\x1b[2J400")
    for names in (["start"], [], ["eval"], [], ["eval"], [], ["wait_for_trees"]):  # both temperatures: told once
        progress.phase(names)
    progress.update(0, {"heldout/success_t1.0": 0.25, "time/eval_s": 30.0})
    progress.update(20, METRICS)
    progress.phase(["eval", "wait_for_trees"])
    progress.update(40, METRICS)
    progress.phase(["eval"])
    clock.now += 10.0
    progress.phase(["export"])
    told = [line for line in out.getvalue().splitlines() if not line.startswith("update")]
    assert told == [
        "making the start policy …  left ?",
        "step 50/\\x1b[2J400",
        "starting the actors …  left ?",
        "first evaluation …  left ?",
        "evaluating …  left 1m50s",  # 20 updates of 4 s, and the last evaluation
        "last evaluation …  left 30s",
        "exporting the policy …  left 20s",
    ]


def test_the_bar_of_a_terminal_fills_by_the_time_of_the_whole_run() -> None:
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, force_terminal=True, color_system=None, width=100, height=40)
    with Progress(2, console=console, clock=clock) as progress:
        progress.phase(["policy"])
        clock.now += 20.0
        progress.step("step 50/\x1b[2J400, 70 s left")
        assert "now: making the start policy (step 50/\\x1b[2J400, 70 s left)" in out.getvalue()
        assert "20s so far, ? left" in out.getvalue()
        progress.phase(["eval"])
        clock.now += 8.0
        progress.update(0, {"heldout/success_t1.0": 0.25, "time/eval_s": 8.0})
        clock.now += 4.0
        before = len(out.getvalue())
        progress.update(1, METRICS)
        # 32 s of 32 + 4 + 8: 23 of the 32 cells and a half one.
        shown = out.getvalue()[before:]
        assert "32s so far, 12s left" in shown
        assert "━" * 23 in shown
        assert "━" * 25 not in shown


def test_a_terminal_gets_a_table_that_is_redrawn() -> None:
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, force_terminal=True, width=140, height=40)
    with Progress(40, console=console, clock=clock) as progress:
        progress.update(0, {"heldout/success_t1.0": 0.25})
        clock.now += 2.0
        progress.update(1, METRICS)
        progress.update(1, {"heldout/success_t1.0": 0.5})
        progress.message("a line above")
        clock.now += 1.0
        progress.phase(["eval", "wait_for_trees"])
    shown = out.getvalue()
    for expected in (
        "0.250 → 0.500",
        "update 1/40",
        "waiting 75%  update 25%",
        "75% cached",
        "2500",
        "a line above",
        "now: evaluating, waiting for trees",
    ):
        assert expected in shown
    assert "\x1b[" in shown


@given(st.text())
def test_nothing_printable_steers_a_terminal(text: str) -> None:
    shown = printable(text)
    assert all(c == "\n" or c.isprintable() for c in shown)
    assert printable(shown) == shown


def test_terminal_escapes_and_reordering_are_shown_as_escapes() -> None:
    assert printable("a\x1b]0;title\x07\r\u202eb\u200b\x9b1m\nü") == "a\\x1b]0;title\\x07\\r\\u202eb\\u200b\\x9b1m\nü"


def test_sparkline() -> None:
    assert sparkline([0.0, 0.5, 1.0, float("nan"), -1.0, 2.0]) == "▁▅█▁█"
