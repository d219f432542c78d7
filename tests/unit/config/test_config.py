"""Settings are checked where they are read, and errors name them."""

import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.paths import CONFIGS as CONFIG_FOLDER
from trace_async.config import (
    BudgetConfig,
    Config,
    ConfigError,
    EngineConfig,
    PredictorConfig,
    config_from_yaml,
    config_to_dict,
    config_to_yaml,
    load_config,
)

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


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_shipped_config_is_short_and_valid(path: Path):
    # A comparison lists all its methods.
    assert len(path.read_text().splitlines()) <= (60 if path.parent.name == "compare" else 40)
    if path.parent.name != "compare":
        load_config(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("budget.root_rolouts=3", "Did you mean one of: 'root_rollouts'"),
        ("budget.root_rollouts=many", "budget.root_rollouts=many: must be a whole number ≥ 2"),
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


def test_importing_the_settings_loads_none_of_the_large_libraries():
    large = "{'torch', 'numpy', 'omegaconf', 'transformers', 'ray', 'mlflow'}"
    code = (
        f"import sys, trace_async.config; loaded = {large} & set(sys.modules); sys.exit(str(loaded) if loaded else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learner.max_tokens_per_micro_batch=-1", "learner.max_tokens_per_micro_batch=-1: must be ≥ 1"),
        ("budget.root_rollouts=true", "budget.root_rollouts=True: must be a whole number ≥ 2"),
        ("budget.root_rollouts=64.5", "budget.root_rollouts=64.5: must be a whole number ≥ 2"),
        ("budget.max_per_prefix=0", "budget.max_per_prefix=0: must be a whole number ≥ 1 or null"),
        ("budget=5", "budget=5: a section of settings"),
        ("budget=[5]", "budget=[5]: a section of settings"),
        ("sampling.max_observation_tokens=3", "sampling.max_observation_tokens=3: must be a whole number: 0 or ≥ 16"),
        ("sampling.top_p=2", "sampling.top_p=2: must be in (0, 1]"),
        ("loss.kl_loss_coef=nan", "loss.kl_loss_coef=nan: must be a number ≥ 0"),
        ("loss.dual_clip=0.5", "loss.dual_clip=0.5: must be a number: 0 or > 1"),
        ("learner.zero_stage=4", "learner.zero_stage=4: expected one of 0 | 1 | 2 | 3"),
        ("learner.max_grad_norm=0", "learner.max_grad_norm=0: must be > 0"),
        ("policy.hidden_size=33", "policy.hidden_size=33: must be ≥ 32, a multiple of 32"),
        ("tracking.system_metrics=maybe", "tracking.system_metrics=maybe: must be true or false"),
        ("tracking.trees_per_artifact=-1", "tracking.trees_per_artifact=-1: must be ≥ 0"),
        ("eval.temperatures=[]", "eval.temperatures=[]: must be a list of at least 1, each a number ≥ 0"),
        ("eval.temperatures=[1,-1]", "eval.temperatures[1]=-1: must be"),
        ("engine={lora_rnk: 3}", "engine.lora_rnk=3: unknown setting. Did you mean one of: 'lora_rank'"),
        ("bugdet.root_rollouts=3", "bugdet={root_rollouts: 3}: unknown setting. Did you mean one of: 'budget'"),
        ("policy.path=[a]", "policy.path=[a]: must be text"),
        ("env.name=", "env.name=None: must be text that is not empty"),
        ("env.args=[1]", "env.args=[1]: must be a mapping"),
        ("name=..", "name=..: a plain name"),
        ("engine.url=${oc.env:NOT_SET_ANYWHERE}", "engine.url: Environment variable 'NOT_SET_ANYWHERE' not found"),
        ("env.args.copy=${budget}", "${budget} stands for a whole section"),
    ],
)
def test_an_error_names_the_setting_the_value_given_and_the_rule(override: str, message: str):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(None, [override])


def test_all_that_is_wrong_is_told_at_once():
    with pytest.raises(ConfigError) as raised:
        load_config(None, ["seed=-1", "budget.root_rollouts=0"])
    assert str(raised.value).splitlines() == ["seed=-1: must be ≥ 0", "budget.root_rollouts=0: must be ≥ 2"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BudgetConfig(root_rollouts=1), "budget.root_rollouts=1: must be ≥ 2"),
        (lambda: replace(Config(), seed=-1), "seed=-1: must be ≥ 0"),
        (lambda: PredictorConfig(trunk="policy", path="x"), "predictor.path=x: trunk=policy reads the policy itself"),
        (lambda: PredictorConfig(window_versions=0), "predictor.window_versions=0"),
        (lambda: PredictorConfig(head_l2=-1.0), "predictor.head_l2=-1.0"),
        (lambda: EngineConfig(lora_rank=3), "engine.backend=torch: only vllm takes LoRA adapters"),
    ],
)
def test_a_section_made_in_python_is_checked_alike(make: Callable[[], object], message: str):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make()


def test_a_predictor_on_the_policys_states_needs_whole_weights():
    adapters = ["engine.backend=vllm", "engine.weight_sync=disk", "engine.lora_rank=8", "learner.lora_rank=8"]
    with pytest.raises(ConfigError, match=r"predictor\.trunk=policy: needs whole weights, .* set own"):
        load_config(None, [*adapters, "predictor.trunk=policy"])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "policy"),
        (["predictor.trunk=own"], "own"),
        (["predictor.path=models/small"], "own"),
        (["engine.backend=vllm", "engine.lora_rank=8", "learner.lora_rank=8"], "own"),
        (["learner.lora_rank=8"], "policy"),  # merged weights are sent
    ],
)
def test_the_predictor_reads_the_policys_states_wherever_it_can(overrides: list[str], expected: str):
    assert load_config(None, overrides).predictor_trunk == expected


def test_what_the_environment_brings_is_used_but_never_written_down(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SECRET_TOKEN", "s3cret")
    overrides = [
        "env.args.keys=['${oc.env:SECRET_TOKEN}']",
        "engine.url=http://${oc.env:SECRET_TOKEN}@host",
        "env.args.again=${engine.url}",
    ]
    config = pickle.loads(pickle.dumps(load_config(None, overrides)))
    assert config.engine.url == "http://s3cret@host"
    assert config.env.args == {"keys": ["s3cret"], "again": "http://s3cret@host"}
    written = config_to_yaml(config)
    for shown in (written, str(config_to_dict(config)), repr(config), repr(replace(config.engine, num_threads=2))):
        assert "s3cret" not in shown
    assert config_from_yaml(written) == config
    with pytest.raises(ConfigError) as raised:
        load_config(None, ["engine.backend=${oc.env:SECRET_TOKEN}", "sampling.top_k=${oc.env:SECRET_TOKEN}"])
    assert "s3cret" not in str(raised.value)
    assert "engine.backend=${oc.env:SECRET_TOKEN}: expected one of torch | sglang" in str(raised.value)


def test_a_number_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("UPDATES", "7")
    assert load_config(None, ["num_updates=${oc.env:UPDATES}"]).num_updates == 7


def test_an_expression_may_name_a_setting_that_was_left_at_its_default():
    assert load_config(None, ["actors.prompts_per_actor=${budget.pool_size}"]).actors.prompts_per_actor == 192
