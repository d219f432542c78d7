"""Several domains together: shares by weight, tasks and words of all, each task played by its own domain."""

from collections import Counter
from random import Random
from typing import Any

import pytest

from envs.mixed import Mixed
from trace_async.config import ConfigError
from trace_async.env import DemonstrationSource, Demonstrator

TWO: dict[str, dict[str, Any]] = {
    "math": {"args": {"num_train": 40}},
    "functions": {"weight": 3, "args": {"num_train": 60}},
}


def test_any_stretch_holds_the_domains_by_weight() -> None:
    tasks = Mixed(domains=TWO).tasks("train")
    assert Counter(task.domain for task in tasks) == {"functions": 60, "math": 20}
    for start in (0, 17, 40):
        assert Counter(task.domain for task in tasks[start : start + 20]) == {"functions": 15, "math": 5}


def test_tasks_are_the_domains_own_with_ids_of_their_own() -> None:
    mixed = Mixed(domains=TWO)
    tasks = mixed.tasks("train")
    assert len({task.id for task in tasks}) == len(tasks) == 80
    assert {task.id.split("/")[0] for task in tasks} == {"math", "functions"}
    assert list(tasks) == list(Mixed(domains=TWO).tasks("train"))


async def test_each_task_is_played_by_its_domain() -> None:
    mixed = Mixed(
        domains={"math": {"args": {"misread_rate": 0, "early_rate": 0}}, "functions": {"args": {"misread_rate": 0}}}
    )
    assert isinstance(mixed, Demonstrator)
    assert isinstance(mixed, DemonstrationSource)
    for task in mixed.demonstration_tasks()[:10]:
        env = mixed.make_env(task)
        await env.init()
        for turn in mixed.demonstrate(task, Random(0)):
            result = await env.step(turn)
        assert result.reward == 1.0
    await mixed.close()


def test_the_vocabulary_is_the_union() -> None:
    words = set(Mixed(domains=TWO).vocabulary())
    assert {"monday", "<python>", '"move_file" {"move_file"'} <= words


@pytest.mark.parametrize(
    ("domains", "problem"),
    [
        ({"maths": {}}, "did you mean math"),
        ({"math": {"weight": 0}}, r"math\.weight=0\.0: must be > 0"),
        ({"math": {"share": 1}}, r"unknown \['share'\]"),
        ({"math": {}, "envs.math.domain:Math": {}}, "each domain once"),
        ({"mixed": {}}, "no other mix"),
    ],
)
def test_impossible_mixes_name_the_setting(domains: dict, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        Mixed(domains=domains)


def test_a_task_of_another_domain_is_refused() -> None:
    multihop = Mixed(domains={"math": {}}).tasks("train")[0]
    with pytest.raises(ValueError, match="has no domain math"):
        Mixed(domains={"functions": {}}).make_env(multihop)


def test_a_domain_without_demonstrations_is_named() -> None:
    with pytest.raises(ConfigError, match="gymnasium has no demonstrations"):
        Mixed(
            domains={"envs.gymnasium_adapter:Gymnasium": {"args": {"env": "tests.unit.envs.test_contract:Counter"}}}
        ).vocabulary()
