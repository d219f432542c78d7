"""Decide which process computes where: one rule for a laptop, one GPU, a box of eight and a cluster.

Three parts of a run can compute on GPUs: the learner's ranks, the generators and the predictors. What hosts prompts and
the trainer's own process compute on the CPU. For the three:

1. A part is on the GPU if its `device` is `cuda`, or if it is `auto` and there are GPUs.
2. It reserves what `actors.learner_gpus`, `generator_gpus` or `predictor_gpus` say. A generator of
   `engine.tensor_parallel_size` > 1 takes as many GPUs without being told.
3. Ranks of the learner that say nothing take one GPU each, as long as one is left for the others.
4. All others share what is left: each takes 1 / ⌈processes / GPUs⌉ of a GPU.

So on one GPU learner, generator and predictor get a third each, and on eight a whole one each; more generators use the
rest. A share is what Ray counts. It bounds neither the memory nor the time that a process takes of its GPU.
"""

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

from trace_async.config import Config, ConfigError
from trace_async.config.task import Device

# Ray counts parts of a GPU in ten-thousandths.
RAYS_UNIT = 10_000


def num_gpus_here() -> int:
    """Count the NVIDIA GPUs of this machine that CUDA_VISIBLE_DEVICES does not hide.

    It asks the system and not torch, because the trainer's torch may be a CPU build beside a server that has a GPU.
    """
    found = len(list(Path("/dev").glob("nvidia[0-9]*")))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found
    return min(found, sum(name.strip() not in ("", "-1") for name in visible.split(",")))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Processes of one kind, as the settings have them."""

    section: str
    """The section of settings that has its `device`."""
    device: str
    gpus_setting: str
    gpus: float
    """GPUs that each of them is said to reserve. 0: nothing is said."""
    count: int

    def is_on_gpu(self, num_gpus: float) -> bool:
        """Whether it computes on a GPU where there are so many. Raises ConfigError when its settings contradict."""
        if self.device == "cpu" and self.gpus:
            raise ConfigError(
                f"{self.gpus_setting}={self.gpus:g}: with {self.section}.device=cpu it would stand idle; "
                f"{self.gpus_setting}=0, or {self.section}.device=auto"
            )
        if self.device == "cuda" and not num_gpus:
            raise ConfigError(f"{self.section}.device=cuda: there is no GPU here; set auto or cpu")
        return self.device == "cuda" or (self.device == "auto" and (num_gpus > 0 or self.gpus > 0))


def place(config: Config, num_gpus: float, *, only_generators: bool = False) -> Config:
    """Return the settings with each `device` and each number of reserved GPUs decided, for `num_gpus` in all.

    With `only_generators`, for an evaluation, the settings of the others stay as they are. A generator whose server
    runs already (`engine.url`) stays as it is and reserves nothing by itself. Raises ConfigError when GPUs are asked
    for and none is left. What is reserved by setting is not summed up here; `actors.ray_cluster` compares it with Ray.
    """
    parts = [part for part in _parts(config) if part.section == "engine" or not only_generators]
    on_gpu = [part for part in parts if part.is_on_gpu(num_gpus)]
    gpus = {part.section: part.gpus for part in on_gpu if part.gpus}
    left = num_gpus - sum(part.gpus * part.count for part in on_gpu)
    silent = [part for part in on_gpu if not part.gpus]
    ranks = next((part for part in silent if part.section == "learner"), None)
    if ranks is not None and left >= ranks.count + (len(silent) > 1):
        gpus["learner"] = 1.0
        left -= ranks.count
        silent.remove(ranks)
    elif ranks is not None and ranks.count > 1:  # NCCL refuses two ranks on one GPU
        raise ConfigError(
            f"learner.num_ranks={ranks.count}: each rank needs a GPU of its own, the other parts at least one, and "
            f"{left:g} of {num_gpus:g} are free; use fewer ranks, or say who gets how much of a GPU "
            f"({', '.join(part.gpus_setting for part in silent)})"
        )
    share = _share(left, sum(part.count for part in silent))
    for part in silent:
        if not share:
            raise ConfigError(
                f"{part.gpus_setting}=0: of {num_gpus:g} GPUs none is left; reserve less for the others, or set "
                f"{part.section}.device=cpu"
            )
        gpus[part.section] = share
    return _decided(config, {part.section: gpus.get(part.section, 0.0) for part in parts})


def _parts(config: Config) -> list[_Part]:
    actors, engine = config.actors, config.engine
    parts = [
        _Part(
            section="learner",
            device=config.learner.device,
            gpus_setting="actors.learner_gpus",
            gpus=actors.learner_gpus,
            count=config.learner.num_ranks,
        ),
        _Part(
            section="predictor",
            device=config.predictor.device,
            gpus_setting="actors.predictor_gpus",
            gpus=actors.predictor_gpus,
            count=1 + config.predictor.num_replicas,
        ),
    ]
    if not engine.url:
        whole = engine.tensor_parallel_size if engine.tensor_parallel_size > 1 and engine.device != "cpu" else 0
        parts.append(
            _Part(
                section="engine",
                device="cpu" if engine.backend == "fake" else engine.device,
                gpus_setting="actors.generator_gpus",
                gpus=actors.generator_gpus or whole,
                count=actors.most_generators,
            )
        )
    return parts


def _share(num_gpus: float, processes: int) -> float:
    """Return each process's part, at most 1, so that whole GPUs hold them all. 0 when nothing is left."""
    if not processes:
        return 0.0
    whole = math.floor(num_gpus)
    part = 1 / math.ceil(processes / whole) if whole else num_gpus / processes
    # 1 − 0.8 is a little below 0.2, which must not cost a ten-thousandth.
    return max(0, math.floor(round(part * RAYS_UNIT, 6))) / RAYS_UNIT


def _decided(config: Config, gpus: dict[str, float]) -> Config:
    """Write what each section's processes reserve, 0 for the CPU, into the settings."""

    def device(section: str) -> Device:
        return "cuda" if gpus[section] else "cpu"

    actors = config.actors
    if "learner" in gpus:
        actors = replace(actors, learner_gpus=gpus["learner"], predictor_gpus=gpus["predictor"])
        config = replace(
            config,
            learner=replace(config.learner, device=device("learner")),
            predictor=replace(config.predictor, device=device("predictor")),
        )
    if "engine" in gpus:
        actors = replace(actors, generator_gpus=gpus["engine"])
        config = replace(config, engine=replace(config.engine, device=device("engine")))
    return replace(config, actors=actors)
