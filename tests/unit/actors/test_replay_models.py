"""Real updates made again in one process: the weights of learner and predictor come out to the bit."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from actors.replay import replay
from tests.unit.learner.test_learner import configure, trees_of
from trace_async.config import Config
from trace_async.learner.learner import Learner
from trace_async.learner.state import load_learner, save_learner
from trace_async.predictor.predictor import ValuePredictor
from trace_async.run.schedule import Plan, Schedule, UpdateRecord
from trace_async.trees.tree import RolloutTree
from trace_async.weights import WeightCount

VERSION = 2


class OneRank:
    """A learner in the place of its group."""

    def __init__(self, config: Config, policy_path: Path) -> None:
        self.learner = Learner(config, policy_path)

    async def update(self, trees: Sequence[RolloutTree], policy_version: int) -> dict[str, float]:
        return {f"learner/{name}": value for name, value in self.learner.update(trees, policy_version).items()}

    async def weights(self, policy_version: int) -> list[Any]:
        count = WeightCount()
        for bucket in self.learner.weights():
            count.add(bucket)
        return [count.manifest(policy_version)]

    async def checksum(self, weights: Sequence[Any]) -> str:
        return weights[-1].checksum

    async def save(self, folder: Path) -> None:
        save_learner(self.learner, folder)

    async def load(self, folder: Path) -> None:
        load_learner(self.learner, folder)


class OnePredictor:
    """A predictor in the place of its actor."""

    def __init__(self, config: Config, policy_path: Path) -> None:
        self.predictor = ValuePredictor(config.predictor, policy_path, seed=config.seed)

    async def train(
        self, trees: Sequence[RolloutTree], policy_version: int, taught: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, float]:
        assert taught is None  # its own trunk learns from the trees alone
        return {f"predictor/{name}": value for name, value in self.predictor.train(trees, policy_version).items()}

    async def checksum(self) -> str:
        return self.predictor.learnt().manifest.checksum

    async def load(self, folder: Path) -> None:
        self.predictor.load(folder)


def a_policy_with_dropout(folder: Path) -> Path:
    sizes = {"vocab_size": 100, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 512}
    config = transformers.GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)
    assert config.resid_pdrop > 0
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("overrides", [[], ["learner.minibatches=2", "learner.zero_stage=2"], ["dropout"]], ids=str)
async def test_updates_come_out_to_the_bit_from_a_checkpoint_and_from_the_beginning(
    tiny_policy_path: Path, tmp_path: Path, overrides: list[str]
):
    policy_path = a_policy_with_dropout(tmp_path / "gpt2") if overrides == ["dropout"] else tiny_policy_path
    config = configure("predictor.trees_per_step=2", *(word for word in overrides if word != "dropout"))
    schedule = Schedule(tmp_path)
    learner, predictor = OneRank(config, policy_path), OnePredictor(config, tiny_policy_path)
    for number in range(1, 5):
        trees = trees_of(number)
        record = UpdateRecord(update=number, policy_version=VERSION, seed=config.seed, arrivals=())
        schedule.begin(record, trees)
        await learner.update(trees, VERSION)
        await predictor.train(trees, VERSION)
        weights = await learner.checksum(await learner.weights(VERSION))
        schedule.end(record, weights=weights, predictor=await predictor.checksum())
        if number == 2:
            await learner.save(tmp_path / "000002" / "learner")
            predictor.predictor.save(tmp_path / "000002" / "predictor")
    learner.learner.engine.destroy()
    for plan in (Plan(tmp_path / "000002", (3, 4)), Plan(None, (1, 2, 3, 4))):
        again = OneRank(config, policy_path)
        made = [one async for one in replay(plan, schedule, again, OnePredictor(config, tiny_policy_path))]
        again.learner.engine.destroy()
        assert [one.record.update for one in made] == list(plan.updates)
        assert [(one.weights, one.predictor) for one in made] == [
            (one.record.weights, one.record.predictor) for one in made
        ]
        assert len({one.weights for one in made} | {one.predictor for one in made}) == 2 * len(made)
