"""The fluent config: the same settings as a YAML file, the same words when one is wrong."""

import subprocess
import sys

import pytest

from scripts.api.config import TraceConfig
from tests.support.paths import CONFIGS
from trace_async.config import Config, ConfigError, load_config


def test_settings_go_to_the_section_that_knows_them():
    config = (
        TraceConfig()
        .environment("math", max_turns=3)
        .policy("/models/x", temperature=0.7)
        .allocation(stage1="pcl", root_rollouts=32, head_lr_scale=2.0)
        .training(num_updates=7, learning_rate=1e-4, eps_clip_low=0.1)
        .env_runners(num_generators=2, backend="fake")
        .evaluation(num_tasks=5)
        .resources(learner_gpus=0.5)
        .reporting(every_updates=3)
        .set("sampling.top_k", 4)
        .to_config()
    )
    assert (config.env.name, config.env.args, config.policy.path) == ("math", {"max_turns": 3}, "/models/x")
    assert (config.sampling.temperature, config.sampling.top_k) == (0.7, 4)
    assert (config.budget.stage1, config.budget.root_rollouts, config.predictor.head_lr_scale) == ("pcl", 32, 2.0)
    assert (config.num_updates, config.learner.learning_rate, config.loss.eps_clip_low) == (7, 1e-4, 0.1)
    assert (config.actors.num_generators, config.engine.backend, config.eval.num_tasks) == (2, "fake", 5)
    assert (config.actors.learner_gpus, config.checkpoint.every_updates) == (0.5, 3)


def test_nothing_set_is_the_default_and_a_file_is_what_it_says():
    assert TraceConfig().to_config() == Config()
    file = next(iter(sorted(CONFIGS.glob("**/quickstart*.yaml"))))
    assert TraceConfig.from_yaml(file, ["seed=3"]).to_config() == load_config(file, ["seed=3"])


def test_a_copy_is_independent():
    first = TraceConfig().environment("math", max_turns=3)
    second = first.copy().environment(max_turns=5)
    assert first.to_config().env.args == {"max_turns": 3}
    assert second.to_config().env.args == {"max_turns": 5}


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (lambda config: config.training(learning_rat=1.0), "did you mean learning_rate"),
        (lambda config: config.set("budget.stage", "pcl"), "did you mean stage"),
        (lambda config: config.set("bugdet.stage1", "pcl"), "no such section"),
        (lambda config: config.callbacks(on_updates=print), "on_update"),
        (lambda config: config.training(num_updates=0).to_config(), "num_updates=0"),
    ],
)
def test_what_is_wrong_is_said_with_the_nearest_name(step, words):
    with pytest.raises(ConfigError, match=words):
        step(TraceConfig())


def test_importing_it_is_light():
    heavy = "{'ray', 'deepspeed', 'mlflow', 'torch', 'transformers', 'sglang', 'vllm'}"
    code = (
        "import sys\nfrom trace_async import TraceConfig\nTraceConfig().to_config()\n"
        f"loaded = {heavy} & set(sys.modules)\nsys.exit(str(loaded) if loaded else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
