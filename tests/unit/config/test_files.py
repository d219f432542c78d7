"""A file may build on others, and those that come with the package are found by name from anywhere."""

import re
from pathlib import Path

import pytest

from tests.support.paths import CONFIGS
from trace_async.config import ConfigError, find_config, load_config


def write(folder: Path, **texts: str) -> Path:
    """Files NAME.yaml with these texts; the path of the last."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / f"{name}.yaml"


def test_a_file_wins_over_its_base_and_the_command_line_over_both(tmp_path: Path):
    write(tmp_path / "base", common="budget: {root_rollouts: 10, pool_size: 50, max_rollouts: 3}\nseed: 7\n")
    path = write(tmp_path / "own", mine="base: ../base/common.yaml\nbudget: {root_rollouts: 20, pool_size: 60}\n")
    config = load_config(path, ["budget.pool_size=70"])
    assert (config.budget.max_rollouts, config.budget.root_rollouts, config.budget.pool_size) == (3, 20, 70)
    assert config.seed == 7


def test_of_several_bases_the_later_one_wins_and_a_base_may_have_its_own(tmp_path: Path):
    path = write(
        tmp_path,
        grandparent="num_updates: 1\nseed: 1\nenv: {args: {a: 1, b: 1}}\n",
        machine="base: grandparent.yaml\nnum_updates: 2\nenv: {args: {b: 2}}\n",
        data="seed: 3\n",
        own="base: [machine.yaml, data.yaml]\n",
    )
    config = load_config(path)
    assert (config.num_updates, config.seed, config.env.args) == (2, 3, {"a": 1, "b": 2})


def test_the_same_base_twice_is_no_circle(tmp_path: Path):
    path = write(tmp_path, root="seed: 5\n", a="base: root.yaml\n", b="base: root.yaml\n", own="base: [a.yaml, b.yaml]")
    assert load_config(path).seed == 5


def test_a_circle_of_bases_is_refused_in_words(tmp_path: Path):
    path = write(tmp_path, a="base: b.yaml\n", b="base: c.yaml\n", c="base: a.yaml\n")
    with pytest.raises(
        ConfigError, match=r"base goes round in a circle: .*c\.yaml → .*a\.yaml → .*b\.yaml → .*c\.yaml"
    ):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: nowhere.yaml\n", "nowhere.yaml does not exist"),
        ("base: 3\n", "base=3: a file or a list of files"),
        ("base: {a: b}\n", "a file or a list of files"),
        ("base: [good.yaml, 4]\n", "a file or a list of files"),
        ("base: broken.yaml\n", "broken.yaml"),
        ("base: wrong.yaml\n", "budget.root_rolouts=3: unknown setting"),
        ("- a\n", "settings are a mapping"),
    ],
)
def test_what_cannot_be_built_on_names_the_file(tmp_path: Path, text: str, message: str):
    write(tmp_path, good="seed: 1\n", broken="budget: [1, 2\n", wrong="budget: {root_rolouts: 3}\n")
    path = write(tmp_path, own=text)
    with pytest.raises(ConfigError, match=re.escape(message)) as raised:
        load_config(path)
    assert "own.yaml" in str(raised.value)


def test_a_base_on_the_command_line_is_refused():
    with pytest.raises(ConfigError, match=r"base=a\.yaml: only a file has one"):
        load_config(None, ["base=a.yaml"])


def test_what_is_written_names_no_base(tmp_path: Path):
    from trace_async.config import config_from_yaml, config_to_yaml

    config = load_config(CONFIGS / "gpu/qwen3_8b_math.yaml")
    assert config_from_yaml(config_to_yaml(config)) == config


@pytest.mark.parametrize("name", ["configs/quickstart/math.yaml", "quickstart/math.yaml"])
def test_shipped_configs_are_found_by_name_from_anywhere(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(name).name == "quickstart_math"
    assert find_config(name) == CONFIGS / "quickstart/math.yaml"


def test_a_file_of_ones_own_comes_before_a_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "configs/quickstart", math="seed: 11\n")
    assert load_config("configs/quickstart/math.yaml").seed == 11


def test_a_file_that_is_nowhere_names_some_that_exist():
    with pytest.raises(ConfigError, match=r"quick\.yaml does not exist; with the package come .*quickstart/math\.yaml"):
        load_config("quick.yaml")
