"""A whole run, and what is kept of it: evaluations, figures and checkpoints."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field

from trace_async.config.method import BudgetConfig, LossConfig, PredictorConfig
from trace_async.config.processes import ActorsConfig, EngineConfig, LearnerConfig
from trace_async.config.section import require, section
from trace_async.config.task import ColdStartConfig, EnvConfig, PolicyConfig, SamplingConfig


@section("eval")
class EvalConfig:
    """Evaluation on held-out tasks, always before the first update and after the last."""

    num_tasks: Annotated[int, Field(ge=1)] = 600
    """Held-out tasks of an evaluation, a sample that is the same in every run."""
    samples_per_task: Annotated[int, Field(ge=1)] = 1
    """Rollouts of a task at each temperature above 0 (greedy: one). From 2 on pass@k is reported too (alias n)."""
    every_updates: Annotated[int, Field(ge=0)] = 0
    """Also after every so many updates (alias test_freq). 0: only before and after."""
    num_generators: Annotated[int, Field(ge=0)] = 1
    """Generators that are lent for an evaluation between updates and keep the weights that it is of. At least one stays
    with training. 0, or where there is only one: training waits until the evaluation is done."""
    keep_trees: bool = True
    """Keep every held-out rollout for the viewer, in `trees/heldout_*.jsonl` of the run."""
    temperatures: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)] = (1.0, 0.0)
    """Sampling temperatures, one evaluation each. 0: greedy."""
    sets: dict[str, Any] = field(default_factory=dict)
    """Further held-out sets that are played with each evaluation, by names of yours, each with `name` and `args` of an
    environment and `num_tasks`: {hotpot: {name: qa_files, args: {…}, num_tasks: 200}}. What is left out is as in `env`
    and `eval.num_tasks`. The figures of a set are `eval/SET/success_t1.0` and so on."""

    def __post_init__(self) -> None:
        for name, wanted in self.sets.items():
            where = f"eval.sets.{name}"
            require(
                re.fullmatch(r"[A-Za-z0-9][\w-]*", name) is not None,
                "eval.sets",
                name,
                "names of letters, digits, - and _",
            )
            require(isinstance(wanted, Mapping), where, wanted, "{name: environment, args: {…}, num_tasks: N}")
            unknown = set(wanted) - {"name", "args", "num_tasks"}
            require(not unknown, where, ", ".join(sorted(map(str, unknown))), "only name, args and num_tasks")
            count = wanted.get("num_tasks", 1)
            whole = isinstance(count, int) and not isinstance(count, bool) and count >= 1
            require(whole, f"{where}.num_tasks", count, "a whole number from 1 on")
            require(isinstance(wanted.get("args", {}), Mapping), f"{where}.args", wanted.get("args"), "a mapping")

    def num_tasks_of(self, set_name: str) -> int:
        """Held-out tasks of a set of `sets`, or of the run's own environment ("")."""
        return int(self.sets[set_name].get("num_tasks", self.num_tasks)) if set_name else self.num_tasks


@section("tracking")
class TrackingConfig:
    """Where a run's figures go besides its own `metrics.jsonl`."""

    backends: tuple[Literal["mlflow", "tensorboard"], ...] = ("mlflow",)
    """Trackers: mlflow, tensorboard (`pip install trace-async[tensorboard]`; its files lie in the run's directory), or
    both. []: only `metrics.jsonl`."""
    uri: str = ""
    """MLflow's tracking server. Empty: a sqlite store under `output_dir`."""
    experiment: Annotated[str, Field(min_length=1)] = "trace_async"
    """MLflow's experiment."""
    system_metrics: bool = True
    """Also record load and memory of the machine."""
    trees_per_artifact: Annotated[int, Field(ge=0)] = 4
    """Rollout trees of every update that are kept to be looked at (`trace-async tree`). 0: none."""
    record_schedule: bool = True
    """Keep what each update was given, all trees included, so that it can be made again (`trace-async replay`): of the
    updates since the oldest checkpoint, once there are `checkpoint.keep` of them."""
    traces_per_update: Annotated[int, Field(ge=0)] = 1
    """Rollouts of every update, drawn at random, that trackers show turn by turn (in MLflow as traces). 0: none."""
    log_model: bool = False
    """Also log the trained policy as a model of the run, from where `mlflow.transformers.load_model` loads it. It is
    copied to MLflow's artifacts and held in memory meanwhile."""


@section("checkpoint")
class CheckpointConfig:
    """What `trace-async train --resume` goes on from."""

    every_updates: Annotated[int, Field(ge=0)] = 10
    """A checkpoint after every so many updates (alias save_freq). 0: only at the end."""
    keep: Annotated[int, Field(ge=1)] = 2
    """The newest so many checkpoints are kept."""
    stop_within_s: Annotated[float, Field(gt=0)] = 60.0
    """A run that is asked to stop (SIGTERM, Ctrl-C) has so long to end the update under way, and as long again to save.
    A machine that is taken away gives 30 to 120 s in all."""


@section("")
class Config:
    """A run. It ends after `num_updates` updates or after `max_generated_tokens` generated tokens."""

    name: Annotated[str, Field(min_length=1)] = "run"
    """The run's name, a plain one without '/'; its directory is `output_dir/name`."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of everything random in the run."""
    output_dir: Annotated[str, Field(min_length=1)] = "runs"
    """Where runs lie."""
    num_updates: Annotated[int, Field(ge=1)] = 40
    """Updates of the policy after which the run ends (alias total_training_steps)."""
    max_generated_tokens: Annotated[int, Field(ge=0)] = 0
    """Generated tokens after which the run ends. 0: no such limit."""
    env: EnvConfig = field(default_factory=EnvConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    cold_start: ColdStartConfig = field(default_factory=ColdStartConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    actors: ActorsConfig = field(default_factory=ActorsConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        plain = "/" not in self.name and self.name.isprintable() and bool(self.name.strip(". "))
        require(plain, "name", ascii(self.name)[1:-1], "a plain name without '/'")
        require(
            self.engine.lora_rank in (0, self.learner.lora_rank),
            "engine.lora_rank",
            self.engine.lora_rank,
            f"0 (merged weights) or that of the learner, learner.lora_rank={self.learner.lora_rank}",
        )
        require(
            self.predictor.trunk != "policy" or not self.engine.lora_rank,
            "predictor.trunk",
            self.predictor.trunk,
            f"needs whole weights, and with engine.lora_rank={self.engine.lora_rank} only adapters are sent; set own, "
            "or engine.lora_rank=0",
        )

    def env_of(self, set_name: str) -> EnvConfig:
        """The environment of a set of `eval.sets`, or the run's own ("")."""
        if not set_name:
            return self.env
        wanted = self.eval.sets[set_name]
        name = str(wanted.get("name", self.env.name))
        own = self.env.args if name == self.env.name else {}
        return dataclasses.replace(self.env, name=name, args=dict(wanted.get("args", own)))

    @property
    def predictor_trunk(self) -> Literal["own", "policy"]:
        """`predictor.trunk`, with auto decided."""
        if self.predictor.trunk == "auto":
            return "own" if self.predictor.path or self.engine.lora_rank else "policy"
        return self.predictor.trunk
