"""A run as a trial of Ray Tune: every iteration is one update.

    tuner = tune.Tuner(
        trainable_of(TraceConfig.from_yaml("configs/quickstart/multihop.yaml")),
        param_space={"learner.learning_rate": tune.loguniform(1e-4, 1e-3)},
        tune_config=tune.TuneConfig(metric="train/reward", mode="max", num_samples=4),
        run_config=tune.RunConfig(stop={"training_iteration": 20}),
    )

Keys of `param_space` are full names of settings. A trial asks Tune for the room of its loop, its generators and its
predictor; the learner's ranks ask Ray for theirs. Start Ray with room for as many trials as are to run at a time.
"""

from pathlib import Path
from typing import Any

from scripts.api.algorithm import TraceAlgorithm
from scripts.api.config import TraceConfig
from trace_async.config import Config
from trace_async.run.placement import place


def trainable_of(config: TraceConfig) -> type[Any]:
    """Return the `ray.tune.Trainable` of `config`, whose settings a trial's parameters override."""
    from ray import tune

    base = config.copy()

    class TraceTrial(tune.Trainable):
        """One run; `setup`, `step` and the rest are called by Tune."""

        @classmethod
        def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
            # Actors that a trial starts are put into its own placement group, which must have a place for each.
            return tune.PlacementGroupFactory(_places(_with(base, config).to_config()))

        def setup(self, config: dict[str, Any]) -> None:
            self._algo = _with(base, config).build(run_dir=Path(self.logdir) / "run")

        def step(self) -> dict[str, Any]:
            result = self._algo.train()
            return {**result.metrics, "policy_version": result.policy_version, tune.result.DONE: result.done}

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            self._algo.save(Path(checkpoint_dir) / "trace_async")

        def load_checkpoint(self, checkpoint: Any) -> None:
            self._algo.stop()
            self._algo = TraceAlgorithm.from_checkpoint(Path(str(checkpoint)) / "trace_async")

        def cleanup(self) -> None:
            self._algo.stop()

    return TraceTrial


def _with(base: TraceConfig, parameters: dict[str, Any]) -> TraceConfig:
    config = base.copy()
    for setting, value in parameters.items():
        config.set(setting, value)
    return config


def _num_gpus() -> float:
    """GPUs of the Ray that Tune runs on; none before it is started."""
    import ray

    return ray.cluster_resources().get("GPU", 0.0) if ray.is_initialized() else 0.0


def _places(config: Config) -> list[dict[str, float]]:
    """CPUs and GPUs of the trial's own process, of each generator and of the predictor."""
    actors = place(config, _num_gpus()).actors
    generator = {"CPU": actors.generator_cpus, "GPU": actors.generator_gpus}
    predictor = {"CPU": float(config.predictor.num_threads), "GPU": actors.predictor_gpus}
    places = [{"CPU": 1.0}, *[generator] * actors.num_generators, predictor]
    return [{resource: amount for resource, amount in place.items() if amount} for place in places]
