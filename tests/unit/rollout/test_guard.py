"""Whatever an environment does costs a rollout, in words, and never the run: each way on its own."""

import asyncio
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from envs.example import GuessNumber
from tests.support import misbehaving
from tests.support.misbehaving import Misbehaving
from trace_async.config import ConfigError, load_config
from trace_async.env import EnvError
from trace_async.policy.small_tokenizer import build_tokenizer
from trace_async.rollout.call_threads import CallThreads, OutranLimitError
from trace_async.rollout.expansion import Expansion
from trace_async.rollout.grower import Grower
from trace_async.rollout.guard import EnvGuard, EnvLimits, make_guard
from trace_async.rollout.limits import rollout_limits
from trace_async.rollout.loop_watch import LoopWatch
from trace_async.rollout.renderer import Renderer
from trace_async.trees.io import tree_from_json, tree_to_json
from trace_async.trees.tree import RolloutTree
from trace_async.types import Completion, SamplingParams, Split, Task, VersionSpan

QUICK = EnvLimits(init_s=0.3, step_s=0.3, fork_s=0.3, close_s=0.3)
RENDERER = Renderer(build_tokenizer(GuessNumber().vocabulary()), max_observation_tokens=32)


async def says_guess_5(task: Task, prompt_ids: tuple[int, ...], params: SamplingParams) -> Completion:
    tokens = (*RENDERER.encode_data("guess 5"), RENDERER.stop_token_ids[0])
    return Completion(
        token_ids=tokens,
        logprobs=(-0.1,) * len(tokens),
        version_spans=(VersionSpan(0, 0),),
        finish_reason="stop",
        prompt_tokens=len(prompt_ids),
        cached_tokens=0,
    )


def grower(domain: GuessNumber, limits: EnvLimits = QUICK, *, max_retries: int = 0) -> Grower:
    play = replace(rollout_limits(load_config(), RENDERER.stop_token_ids), max_retries=max_retries)
    return Grower(EnvGuard(domain.make_env, limits), RENDERER, says_guess_5, play)


def plan_all_on_the_first(anchors, budget):
    counts = np.zeros(len(anchors), dtype=int)
    counts[0] = budget
    return counts


async def grow(mode: str, *, limits: EnvLimits = QUICK, secret: int = 7, every: int = 0) -> RolloutTree:
    """The tree of six root rollouts and, of those that end, one continuation each; now and then it misbehaves.

    Each says `guess 5` until its four turns are over: with the secret 5 it wins at once, with another it never does.
    """
    a_turn = mode.startswith(("step", "content", "role", "fork"))  # what happens four times a rollout, not once
    domain = Misbehaving(mode=mode, every=every or (13 if a_turn else 3))
    split: Split = "heldout" if secret % 3 == 0 else "train"
    task = next(t for t in domain.tasks(split) if str(t.id).removesuffix("\x1b[2J\u202e\ud800").endswith(f"{secret}"))
    expansion = Expansion(plan=plan_all_on_the_first, per_root=1)
    tree = await grower(domain, limits).grow(task, 6, expansion if secret != 5 else None)
    assert len(tree.rollouts) + sum(tree.failures.values()) == 6 + tree.num_continuations_allocated
    assert tree_from_json(tree_to_json(tree)) == tree
    return tree


@pytest.mark.parametrize(
    ("mode", "fault", "words"),
    [
        ("make_raises", "make_env.env_error", "make_env() raised RuntimeError: no sandbox"),
        ("make_none", "make_env.env_value", "make_env(): gives a NoneType without init, step, fork, close"),
        ("init_raises", "init.env_error", "init() raised RuntimeError: no sandbox"),
        ("init_hangs", "init.env_timeout", "init() did not end within env.init_timeout_s=0.3"),
        ("prompt_none", "init.env_value", "init(): gives None instead of a Prompt"),
        ("step_raises", "step.env_error", "step() raised RuntimeError: no sandbox"),
        ("step_panics", "step.env_error", "step() raised Panic: index out of bounds"),
        ("step_exits", "step.env_error", "step(): raised SystemExit: 3"),
        ("step_leaves", "step.env_error", "step(): raised GeneratorExit"),
        ("step_hangs", "step.env_timeout", "step() did not end within env.step_timeout_s=0.3"),
        ("step_cancels", "step.env_error", "step(): cancelled itself"),
        ("fork_raises", "fork.env_error", "fork() raised RuntimeError: no sandbox"),
        ("fork_none", "fork.env_value", "fork(): gives a NoneType without init, step, fork, close"),
        ("fork_hangs", "fork.env_timeout", "fork() did not end within env.fork_timeout_s=0.3"),
        ("prompt_changes", "init.env_error", "init() gives another prompt than before"),
        ("result_none", "step.env_value", "step(): gives None instead of a StepResult"),
        ("content_none", "step.env_value", "step(): messages[0].content must be text, not None"),
        ("content_integer", "step.env_value", "step(): messages[0].content must be text, not 5"),
        (
            "content_tokens",
            "step.env_value",
            "messages[0].token_ids must be token ids (whole numbers from 0), not 'abc'",
        ),
        ("role_odd", "step.env_value", "messages[0].role must be one of system, user, assistant, tool, not 'narrator'"),
        ("reward_nan", "step.env_value", "step(): reward must be a finite number, not nan"),
        ("reward_inf", "step.env_value", "step(): reward must be a finite number, not inf"),
        ("reward_text", "step.env_value", "step(): reward must be a finite number, not '1.0'"),
        ("reward_seven", "step.env_value", "the reward 7.0 is outside of [0, 1]; set env.reward_range"),
        ("reward_negative", "step.env_value", "the reward -1.0 is outside of [0, 1]; set env.reward_range"),
        ("metric_nan", "step.env_value", "step(): metrics['found'] must be a finite number, not nan"),
        ("metric_none", "step.env_value", "step(): metrics['found'] must be a finite number, not None"),
        ("metric_twins", "step.env_value", "metrics['F1 (%)'] and metrics['F1 [%]'] would both be called 'F1 ___'"),
        ("metric_many", "step.env_value", "there are 1000 metrics of one rollout; at most 200"),
    ],
)
async def test_what_breaks_down_costs_its_rollout_and_names_environment_task_and_method(mode, fault, words):
    tree = await grow(mode)
    assert list(tree.faults) == [fault]
    assert tree.faults[fault].words.startswith("environment misbehaving, task train-7: ")
    assert words in tree.faults[fault].words
    assert set(tree.failures) == {fault.partition(".")[2]}
    assert sum(tree.failures.values()) == tree.faults[fault].count
    assert len(tree.rollouts) >= 4  # the others go on
    assert {rollout.reward for rollout in tree.rollouts} == {0.0}


@pytest.mark.parametrize("mode", ["init_raises", "step_hangs", "make_raises", "reward_nan"])
async def test_what_broke_down_once_is_tried_again(mode):
    domain = Misbehaving(mode=mode, every=13 if mode == "step_hangs" else 3)
    tree = await grower(domain, max_retries=2).grow(domain.tasks("train")[0], 4)
    assert len(tree.rollouts) == 4
    assert tree.failures == {}
    assert sum(fault.count for fault in tree.faults.values()) >= 1


@pytest.mark.parametrize(
    ("mode", "reward", "metrics"),
    [
        ("reward_true", 1.0, {}),
        ("reward_integer", 1.0, {}),
        ("reward_numpy", 1.0, {}),
        ("reward_array", 1.0, {}),
        ("metric_true", 1.0, {"found": 1.0}),
        ("metric_numpy", 1.0, {"found": 3.0}),
        ("metric_ours", 1.0, {"env_overlong": 0.25}),
        ("metric_odd_name", 1.0, {"F1 ____": 0.5}),
    ],
)
async def test_what_has_a_plain_meaning_is_converted(mode, reward, metrics):
    tree = await grow(mode, secret=5, every=1)
    assert tree.failures == {}
    assert [(rollout.reward, dict(rollout.metrics)) for rollout in tree.rollouts] == [(reward, metrics)] * 6
    values = [tree.rollouts[0].reward, *tree.rollouts[0].metrics.values()]
    assert {type(value) for value in values} == {float}


@pytest.mark.parametrize("mode", ["content_numpy", "content_huge", "content_control", "content_surrogate"])
async def test_any_text_is_an_observation_cut_to_its_limit(mode):
    tree = await grow(mode, every=1)
    assert tree.failures == {}
    assert max(len(node.token_ids) - node.num_generated for node in tree.nodes[1:]) <= 32 + 4


@pytest.mark.parametrize(
    ("mode", "task_id", "data"),
    [
        ("id_integer", "7", {"secret": 7}),
        ("id_escape", "train-7\x1b[2J\u202e\ud800", {"secret": 7}),
        ("data_numpy", "train-7", {"secret": 7, "at": [1, 2.0]}),
        ("data_array", "train-7", {"secret": 7, "grid": [0, 1, 2]}),
    ],
)
async def test_a_tasks_odd_values_are_plain_in_its_tree(mode, task_id, data):
    tree = await grow(mode)
    assert (tree.task.id, tree.task.data) == (task_id, data)
    assert len(tree.rollouts) == 12


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("data_date", "task.data['made'] must be JSON"),
        ("data_nan", "task.data['price'] must be JSON"),
        ("data_digits", "task.data['n'] must be JSON"),
    ],
)
async def test_a_task_that_cannot_be_written_down_is_refused_by_its_field(mode, words):
    tree = await grow(mode)
    assert tree.failures == {"env_value": 6}
    assert "environment misbehaving, task train-7: make_env(): " in tree.faults["make_env.env_value"].words
    assert words in tree.faults["make_env.env_value"].words


@pytest.mark.parametrize(("mode", "kind"), [("close_raises", "env_error"), ("close_hangs", "env_timeout")])
async def test_an_environment_that_does_not_close_costs_no_reward(mode, kind):
    tree = await grow(mode)
    assert len(tree.rollouts) == 12
    assert tree.failures == {}
    assert set(tree.faults) == {f"close.{kind}"}


async def test_a_call_that_swallows_its_cancellation_is_left_behind(monkeypatch):
    monkeypatch.setattr("trace_async.rollout.guard.STOP_GRACE_S", 0.1)
    misbehaving.RELEASED.clear()  # another test may have set it at its end
    tree = await grow("step_swallows")
    assert set(tree.failures) == {"env_timeout"}
    assert len(tree.rollouts) >= 4
    misbehaving.RELEASED.set()


@pytest.mark.parametrize(("low", "high", "given", "mapped"), [(-1, 1, -1.0, 0.0), (0, 10, 7.0, 0.7), (-1, 1, 1, 1.0)])
async def test_rewards_of_another_range_are_mapped(low, high, given, mapped):
    mode = {-1.0: "reward_negative", 7.0: "reward_seven", 1: "reward_integer"}[given]
    limits = EnvLimits(reward_range=(low, high))
    tree = await grow(mode, limits=limits, secret=5, every=1)
    assert {rollout.reward for rollout in tree.rollouts} == {mapped}


async def test_a_prompt_too_long_is_counted_and_not_tried_again():
    domain = Misbehaving(mode="prompt_long", every=1)
    tree = await grower(domain, max_retries=3).grow(domain.tasks("train")[0], 2)
    assert tree.failures == {"prompt_too_long": 2}
    assert tree.faults["init.prompt_too_long"].count == 2
    assert "sampling.max_context_tokens=512" in tree.faults["init.prompt_too_long"].words


# ── blocking ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_synchronous_tool_is_told_about_once_by_name():
    tree = await grow("step_sleeps", limits=EnvLimits(), every=20)
    assert list(tree.faults) == ["step.holds_loop"]
    assert tree.faults["step.holds_loop"].count == 2
    words = tree.faults["step.holds_loop"].words
    assert "environment misbehaving, task train-7: step() kept all other prompts of its process waiting" in words
    assert "env.blocking=true" in words


async def test_a_blocking_environment_runs_in_threads_beside_the_loop():
    domain = Misbehaving(mode="step_sleeps", every=20)
    tree = await grower(domain, EnvLimits(blocking=True)).grow(domain.tasks("train")[0], 6)
    assert len(tree.rollouts) == 6
    assert tree.faults == {}
    assert domain.threads == {"environment"}
    await grower(domain, EnvLimits()).grow(domain.tasks("train")[0], 1)
    assert domain.threads == {"environment", threading.current_thread().name}


@pytest.mark.parametrize("mode", ["step_hangs", "step_raises", "init_raises", "step_exits", "step_panics"])
async def test_in_threads_the_same_faults_are_found(mode):
    here, there = await grow(mode), await grow(mode, limits=EnvLimits(blocking=True, step_s=0.5))
    assert set(here.failures) == set(there.failures)
    assert list(here.faults) == list(there.faults)


async def test_what_computes_in_python_without_end_is_broken_off_and_its_thread_ends():
    threads = CallThreads()
    before = threading.active_count()

    def forever() -> None:
        while True:
            pass

    with pytest.raises(OutranLimitError):
        await threads.run(forever, 0.2)
    assert threads.num_abandoned == 0
    for _ in range(100):
        if threading.active_count() <= before:
            break
        await asyncio.sleep(0.05)
    assert threading.active_count() <= before


async def test_what_sleeps_inside_c_is_left_behind_and_its_slot_is_free(monkeypatch):
    monkeypatch.setattr("trace_async.rollout.call_threads.STOP_GRACE_S", 0.1)
    threads = CallThreads(at_once=1)
    with pytest.raises(OutranLimitError):
        await threads.run(lambda: time.sleep(3), 0.1)
    assert threads.num_abandoned == 1
    assert await threads.run(lambda: 7, 10) == 7


async def test_a_stretch_that_never_ends_is_seen_from_outside():
    seen: list[str] = []
    found = threading.Event()
    watch = LoopWatch(lambda where, seconds: None)
    watch.patrol(0.1, lambda where, seconds: found.set() if seen.append(where) is None else None)

    async def blocks() -> None:
        found.wait(30)

    await watch.drive("the tool", blocks())
    assert seen == ["the tool"]


@pytest.mark.skipif(not Path("/proc/thread-self/schedstat").exists(), reason="this kernel does not say who waits")
async def test_waiting_for_a_core_is_not_held_against_the_environment():
    """Four threads of work want one core: the stretch lasts about four times as long as what it computes."""
    told: list[float] = []
    watch = LoopWatch(lambda where, seconds: told.append(seconds), slow_s=0.1)
    computed_s = 0.4

    async def computes() -> None:
        began = time.thread_time()
        while time.thread_time() - began < computed_s:
            pass

    before = os.sched_getaffinity(0)
    core = {min(before)}
    spin = [sys.executable, "-c", f"import os\nos.sched_setaffinity(0, {core})\nprint(flush=True)\nwhile True: pass"]
    others = [subprocess.Popen(spin, stdout=subprocess.PIPE) for _ in range(3)]  # noqa: ASYNC220 - nothing else waits
    try:
        for other in others:
            assert other.stdout is not None
            other.stdout.readline()
        os.sched_setaffinity(0, core)  # of this thread alone
        began = time.monotonic()
        await watch.drive("the tool", computes())
        lasted_s = time.monotonic() - began
    finally:
        os.sched_setaffinity(0, before)
        for other in others:
            other.kill()
            other.communicate()
    assert lasted_s > 1.5 * computed_s
    assert told == [pytest.approx(computed_s, abs=0.2)]


# ── Stage 1 ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_candidates_are_asked_once_and_remembered():
    domain = Misbehaving()
    asked = grower(domain)
    made: Counter[str] = Counter()
    make = domain.make_env

    def counted(task: Task):
        made[task.id] += 1
        return make(task)

    asked.guard._make_env = counted
    task = domain.tasks("train")[0]
    first, second = await asked.ask(task), await asked.ask(task)
    assert first == second
    assert first.positions == (len(first.token_ids),)
    assert made == {task.id: 1}


async def test_a_candidate_is_asked_again_and_then_given_up_by_name():
    domain = Misbehaving(mode="init_raises", every=2)
    tasks = domain.tasks("train")
    patient = grower(domain, max_retries=1)
    assert len([await patient.ask(task) for task in tasks]) == len(tasks)
    with pytest.raises(EnvError, match=r"environment misbehaving, task train-1: init\(\) raised RuntimeError"):
        await grower(Misbehaving(mode="init_raises", every=1), max_retries=2).ask(tasks[0])


# ── settings ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_settings_of_env_reach_the_guard_and_a_domain_may_ask_for_threads_itself():
    settings = load_config(None, ["env.step_timeout_s=7", "env.reward_range=[-1, 1]"]).env
    limits = make_guard(settings, GuessNumber()).limits
    assert (limits.step_s, limits.init_s, limits.reward_range, limits.blocking) == (7.0, 120.0, (-1.0, 1.0), False)
    assert limits.of("answer") == ("env.step_timeout_s", 7.0)
    asks = GuessNumber()
    asks.blocking = True  # type: ignore[attr-defined]
    assert make_guard(settings, asks).limits.blocking
    assert make_guard(load_config(None, ["env.blocking=true"]).env, GuessNumber()).limits.blocking


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("env.reward_range=[1, 0]", "the lowest reward, then the highest"),
        ("env.reward_range=[1]", "env.reward_range="),
        ("env.step_timeout_s=0", "env.step_timeout_s=0"),
        ("env.blocking=perhaps", "env.blocking=perhaps"),
    ],
)
def test_settings_that_mean_nothing_are_refused(setting, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        load_config(None, [setting])
