"""`env check` finds, in words, what a run would have to count as lost: the modes of `tests/support/misbehaving.py`."""

import pytest

from envs.contract import plays
from envs.contract.check import check_domain
from envs.contract.plays import Finding
from tests.support.misbehaving import RELEASED, Misbehaving
from trace_async.config import load_config

BROKEN = [
    ("make_raises", "make_env raises RuntimeError: no sandbox"),
    ("make_none", "make_env gives None without async init, step, fork, close"),
    ("init_raises", "init raises RuntimeError: no sandbox"),
    ("prompt_none", "init gives None instead of Prompt"),
    ("prompt_changes", "the prompt is another one when the task is started again; it must not change"),
    ("step_raises", "raises RuntimeError: no sandbox"),
    ("step_exits", "raises SystemExit: 3"),
    ("step_cancels", "cancelled itself"),
    ("fork_raises", "fork raises RuntimeError: no sandbox"),
    ("close_raises", "close raises RuntimeError: no sandbox"),
    ("result_none", "gives None instead of StepResult"),
    ("content_none", "messages[0].content must be text, not None"),
    ("content_integer", "messages[0].content must be text, not 5"),
    ("role_odd", "messages[0].role must be one of"),
    ("reward_nan", "reward must be a finite number, not nan"),
    ("reward_text", "reward must be a finite number, not '1.0'"),
    ("reward_seven", "the reward 7.0 is outside of [0, 1]; set env.reward_range"),
    ("metric_nan", "metrics['found'] must be a finite number, not nan"),
    ("metric_none", "metrics['found'] must be a finite number, not None"),
    ("metric_many", "there are 1000 metrics of one rollout"),
    ("data_date", "task.data['made'] must be JSON"),
]


def findings(mode: str, *settings: str, every: int = 3) -> list[Finding]:
    domain = Misbehaving(mode=mode, every=every)
    return check_domain(domain, num_tasks=1, settings=load_config(None, list(settings)).env)


def said(level: str, found: list[Finding]) -> str:
    return "\n".join(finding.text for finding in found if finding.level == level)


@pytest.mark.parametrize(("mode", "words"), BROKEN)
def test_what_breaks_the_contract_is_an_error(mode: str, words: str) -> None:
    assert words in said("error", findings(mode))


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("reward_true", "the reward is a bool: 1.0 is taken for it"),
        ("reward_numpy", "the reward is a float32: 1.0 is taken for it"),
        ("metric_true", "the metric 'found' is a bool: 1.0 is taken for it"),
        ("content_huge", "an observation has 30,000,000 characters"),
    ],
)
def test_what_is_put_right_is_a_warning(mode: str, words: str) -> None:
    found = findings(mode, every=20 if mode == "content_huge" else 1)
    assert words in said("warning", found)


@pytest.mark.parametrize("mode", ["init_hangs", "step_hangs", "fork_hangs", "close_hangs", "step_swallows"])
def test_what_hangs_is_found_once_and_ends_the_check(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plays, "_STEP_TIMEOUT_S", 0.2)
    monkeypatch.setattr("trace_async.rollout.guard.STOP_GRACE_S", 0.1)
    RELEASED.clear()
    found = findings(mode)
    RELEASED.set()
    assert said("error", found).count("takes longer than 0.2 s") == 1
    assert "the rest was not tried" in said("warning", found)


def test_what_blocks_the_loop_is_told_with_its_remedy_and_is_fine_in_threads() -> None:
    words = said("error", findings("step_sleeps", every=60))
    assert "step held the event loop for 0.6 s" in words
    assert "env.blocking=true" in words
    assert "event loop" not in said("error", findings("step_sleeps", "env.blocking=true", every=60))


def test_rewards_in_the_range_that_is_set_are_in_order() -> None:
    assert "reward_range" in said("error", findings("reward_negative"))
    assert "outside" not in said("error", findings("reward_negative", "env.reward_range=[-1, 1]"))
