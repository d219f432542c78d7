"""Who computes on which GPU, worked out by hand for a laptop, one GPU, a box of eight and a cluster."""

import re

import pytest

from tests.support.paths import CONFIGS
from trace_async.config import Config, ConfigError, load_config
from trace_async.run.placement import num_gpus_here, place


def placed(num_gpus: float, *overrides: str) -> Config:
    return place(load_config(None, overrides), num_gpus)


def devices(config: Config) -> tuple[str, str, str]:
    """Of learner, generators and predictor."""
    return config.learner.device, config.engine.device, config.predictor.device


def gpus(config: Config) -> tuple[float, float, float]:
    """What each rank, each generator and each predictor reserves."""
    return config.actors.learner_gpus, config.actors.generator_gpus, config.actors.predictor_gpus


def test_without_a_gpu_all_compute_on_the_cpu():
    config = placed(0)
    assert devices(config) == ("cpu", "cpu", "cpu")
    assert gpus(config) == (0, 0, 0)


def test_on_one_gpu_learner_generator_and_predictor_share_it():
    config = placed(1)
    assert devices(config) == ("cuda", "cuda", "cuda")
    assert gpus(config) == (0.3333, 0.3333, 0.3333)
    assert gpus(placed(1, "actors.num_generators=2", "predictor.device=cpu")) == (0.3333, 0.3333, 0)


def test_with_two_gpus_the_learner_has_one_and_the_others_share():
    assert gpus(placed(2)) == (1, 0.5, 0.5)
    # Five processes on one GPU: a fifth each.
    assert gpus(placed(2, "actors.num_generators=4")) == (1, 0.2, 0.2)
    # Five on two GPUs: three on the one, two on the other.
    assert gpus(placed(3, "actors.num_generators=4")) == (1, 0.3333, 0.3333)


def test_on_eight_gpus_each_process_has_one():
    assert gpus(placed(8)) == (1, 1, 1)
    assert gpus(placed(8, "learner.num_ranks=4", "actors.num_generators=3")) == (1, 1, 1)
    # Four ranks of the learner leave four GPUs to nine processes: three on one, two on each other.
    assert gpus(placed(8, "learner.num_ranks=4", "actors.num_generators=8")) == (1, 0.3333, 0.3333)
    # Generators that split a model take whole GPUs.
    split = ("engine.backend=sglang", "engine.tensor_parallel_size=2", "actors.num_generators=2", "learner.num_ranks=3")
    assert gpus(placed(8, *split)) == (1, 2, 1)


def test_room_is_kept_for_generators_that_a_run_may_add():
    assert gpus(placed(4, "actors.max_generators=5")) == (1, 0.5, 0.5)


def test_the_configs_of_eight_gpus_and_of_a_cluster_say_all_of_it():
    for name, num_gpus in (("gpu", 8), ("cluster", 32)):
        config = load_config(CONFIGS / name / "qwen3_8b_multihop.yaml")
        found = place(config, num_gpus)
        assert gpus(found) == gpus(config) == (1, 1, 1)
        assert devices(found) == ("cuda", "cuda", "cuda")


def test_what_is_said_holds_and_the_rest_is_shared():
    config = placed(1, "actors.learner_gpus=0.5", "predictor.device=cpu")
    assert gpus(config) == (0.5, 0.5, 0)
    assert devices(config) == ("cuda", "cuda", "cpu")
    assert gpus(placed(1, "actors.generator_gpus=0.4", "actors.learner_gpus=0.4")) == (0.4, 0.4, 0.2)


def test_an_evaluation_gives_the_generators_all_of_it():
    config = place(load_config(None, ["actors.num_generators=2"]), 1, only_generators=True)
    assert gpus(config) == (0, 0.5, 0)
    assert config.learner.device == "auto"


def test_a_server_that_runs_already_and_a_fake_engine_reserve_nothing():
    attached = placed(1, "engine.backend=sglang", "engine.url=http://127.0.0.1:30000")
    assert gpus(attached) == (0.5, 0, 0.5)
    assert attached.engine.device == "auto"
    fake = placed(1, "engine.backend=fake")
    assert gpus(fake) == (0.5, 0, 0.5)
    assert fake.engine.device == "cpu"


@pytest.mark.parametrize(
    ("num_gpus", "overrides", "message"),
    [
        (0, ["learner.device=cuda"], "learner.device=cuda: there is no GPU here"),
        (1, ["engine.device=cpu", "actors.generator_gpus=0.5"], "actors.generator_gpus=0.5: with engine.device=cpu"),
        (1, ["actors.learner_gpus=1"], "actors.predictor_gpus=0: of 1 GPUs none is left"),
        (4, ["learner.num_ranks=4"], "learner.num_ranks=4: each rank needs a GPU of its own"),
        (2, ["learner.num_ranks=4", "predictor.device=cpu", "engine.device=cpu"], "learner.num_ranks=4: each rank"),
    ],
)
def test_what_cannot_be_placed_names_the_setting(num_gpus, overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        placed(num_gpus, *overrides)


def test_hidden_gpus_are_not_there(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert num_gpus_here() == 0
