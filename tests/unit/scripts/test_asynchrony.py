"""What asynchrony buys, in virtual time: the same on every machine, however busy."""

import argparse
from pathlib import Path

import pytest

from scripts.bench.asynchrony import Case, Timed, timed
from scripts.bench.scale import Load, make_policy_folder
from scripts.bench.virtual_time import run_in_virtual_time

ARGUMENTS = argparse.Namespace(generators=2, roots=32, updates=5)
SLOW_TOOLS = Load(prompt_tokens=20, observation_tokens=10, answer_median=20, tool_sigma=1.8, tool_max_s=300.0)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy_folder(tmp_path_factory.mktemp("policy"))


def measured(policy: Path, *, max_staleness: int, barrier: bool = False) -> Timed:
    case = Case(load=SLOW_TOOLS, max_staleness=max_staleness, learner_s=20.0, barrier=barrier)
    return run_in_virtual_time(timed(ARGUMENTS, case, policy))


def test_each_wait_that_is_left_out_saves_time(policy: Path):
    barrier = measured(policy, max_staleness=0, barrier=True)
    synchronous, asynchronous = measured(policy, max_staleness=0), measured(policy, max_staleness=2)
    assert set(barrier.staleness) == set(synchronous.staleness) == {0}
    assert 0 < max(asynchronous.staleness) <= 2
    # Three of the five updates count; each of them has the learner's 20 s and the second of the new weights.
    assert asynchronous.seconds >= 3 * 21
    assert asynchronous.seconds < synchronous.seconds < barrier.seconds
    assert synchronous.seconds == pytest.approx(synchronous.waited_s + 3 * 21)
    assert sum(asynchronous.staleness.values()) == 3 * 32 // 8
