"""Further held-out sets: what is asked of each, and which environment it stands for."""

import pytest

from envs.tasks import heldout_tasks
from trace_async.config import ConfigError, load_config


def test_what_a_set_leaves_out_is_as_in_env_and_eval():
    sets = "eval.sets={few: {num_tasks: 2}, hard: {args: {max_turns: 2}}, other: {name: math}}"
    config = load_config(
        None, ["env.name=envs.example:GuessNumber", "env.args={max_turns: 6}", "eval.num_tasks=4", sets]
    )
    assert config.env_of("few") == config.env_of("") == config.env
    assert (config.env_of("hard").name, config.env_of("hard").args) == ("envs.example:GuessNumber", {"max_turns": 2})
    assert (config.env_of("other").name, config.env_of("other").args) == ("math", {})
    assert {name: len(tasks) for name, tasks in heldout_tasks(config).items()} == {
        "": 4,
        "few": 2,
        "hard": 4,
        "other": 4,
    }


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        ("{a/b: {}}", "eval.sets=a/b: names of letters"),
        ("{a: 3}", "eval.sets.a=3: {name: environment"),
        ("{a: {nam: math}}", r"eval.sets.a=nam: only name, args and num_tasks"),
        ("{a: {num_tasks: 0}}", "eval.sets.a.num_tasks=0: a whole number from 1 on"),
        ("{a: {num_tasks: true}}", "eval.sets.a.num_tasks=True: a whole number"),
        ("{a: {args: [1]}}", r"eval.sets.a.args=\[1\]: a mapping"),
    ],
)
def test_a_set_that_is_none_is_refused_by_name(sets: str, words: str):
    with pytest.raises(ConfigError, match=words):
        load_config(None, [f"eval.sets={sets}"])


def test_a_set_whose_environment_will_not_do_is_named():
    config = load_config(None, ["eval.sets={a: {name: nowhere}}"])
    with pytest.raises(ConfigError, match=r"^eval\.sets\.a: .*nowhere"):
        heldout_tasks(config)
