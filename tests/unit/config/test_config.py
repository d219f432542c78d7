"""Settings are checked where they are read, and errors name them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import CONFIGS as CONFIG_FOLDER
from trace_async.config import Config, ConfigError, config_to_yaml, load_config

CONFIGS = sorted(CONFIG_FOLDER.glob("**/*.yaml"))


def test_a_file_holds_what_differs_and_overrides_win(tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text("budget:\n  root_rollouts: 32\n  pool_size: 100\nenv:\n  args:\n    seed: 3\n")
    config = load_config(path, ["budget.root_rollouts=16", "env.args.worlds=4"])
    assert config.budget.root_rollouts == 16
    assert config.budget.pool_size == 100
    assert config.env.args == {"seed": 3, "worlds": 4}
    assert config.learner == Config().learner


def test_what_is_written_reads_back_the_same(tmp_path: Path):
    config = load_config(None, ["learner.deepspeed.zero_optimization.offload=true", "eval.temperatures=[0.5]"])
    path = tmp_path / "c.yaml"
    path.write_text(config_to_yaml(config))
    assert load_config(path) == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_is_short_and_valid(path: Path):
    # A comparison lists all its methods.
    assert len(path.read_text().splitlines()) <= (60 if path.stem.startswith("compare_") else 40)
    if not path.stem.startswith("compare_"):
        load_config(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("budget.root_rolouts=3", "Did you mean one of: 'root_rollouts'"),
        ("budget.root_rollouts=many", "Value 'many' of type 'str' could not be converted to Integer"),
        ("budget.stage1=best", "expected one of"),
        ("budget.root_rollouts=1", "budget.root_rollouts=1: must be ≥ 2"),
        ("actors.max_staleness=-1", "actors.max_staleness=-1"),
        ("sampling.max_context_tokens=5", "must be greater than sampling.max_turn_tokens"),
        ("name=a/b", "name=a/b"),
        ("engine.tensor_parallel_size=2", "engine.tensor_parallel_size=2: the torch engine does not split a model"),
    ],
)
def test_wrong_settings_are_refused_by_name(override: str, message: str):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(None, [override])


def test_a_missing_or_broken_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml does not exist"):
        load_config(tmp_path / "nowhere.yaml")
    path = tmp_path / "bad.yaml"
    path.write_text("budget: [1, 2\n")
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_config(path)


def test_importing_the_core_loads_no_ray_no_deepspeed_and_no_engine():
    heavy = "{'ray', 'deepspeed', 'mlflow', 'sglang', 'vllm', 'trace_async.engines'}"
    modules = (
        "trace_async.config, trace_async.rollout.prompt_run, trace_async.method.allocation, trace_async.run.buffer"
    )
    code = (
        f"import sys, {modules}; loaded = {heavy} & set(sys.modules); sys.exit(f'loaded: {{loaded}}' if loaded else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
