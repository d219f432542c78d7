"""The parts of a run as plain asyncio objects: the loop is tested without Ray, a model or a clock."""

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import xxhash

from actors.calls import PromptLostError
from actors.generators.generator import GeneratorStats
from actors.generators.router import RouterStats
from actors.learner import LearnerRankError
from actors.prompts.prompt import HeldOut
from tests.unit.run.test_buffer import make_tree
from trace_async.method.posterior import Estimates
from trace_async.run.state import PendingPrompt
from trace_async.trees.io import tree_to_json
from trace_async.trees.tree import RolloutTree
from trace_async.types import LossKind, PrefixQuery, Task


class FakePrompts:
    """Every prompt takes `delays(ticket)` turns of the event loop; `lose(ticket)` says which bring no tree, and why."""

    def __init__(
        self,
        delays: Callable[[int], int] = lambda ticket: 1 + ticket % 5,
        lose: Callable[[int], LossKind | None] = lambda ticket: None,
    ) -> None:
        self.delays, self.lose = delays, lose
        self.gate = asyncio.Event()
        self.gate.set()
        """Cleared: prompts that are under way do not end."""
        self.evaluating = asyncio.Event()
        self.evaluating.set()
        """Cleared: an evaluation does not end."""
        self.under_way: set[int] = set()
        self.most_roots_under_way = 0
        self.roots_under_way = 0
        self.grown: Counter[str] = Counter()

    async def run(self, ticket: int, prompt: PendingPrompt, task: Task) -> RolloutTree:
        self.under_way.add(ticket)
        self.roots_under_way += prompt.num_roots
        self.most_roots_under_way = max(self.most_roots_under_way, self.roots_under_way)
        try:
            for _ in range(self.delays(ticket)):
                await asyncio.sleep(0)
            await self.gate.wait()
        finally:
            self.under_way.discard(ticket)
            self.roots_under_way -= prompt.num_roots
        if (kind := self.lose(ticket)) is not None:
            raise PromptLostError(kind)
        self.grown[task.id] += 1
        return make_tree(task.id, version=prompt.policy_version, num_roots=prompt.num_roots)

    async def prompt_queries(self, tasks: Sequence[Task]) -> list[PrefixQuery | LossKind]:
        return [PrefixQuery(token_ids=(1,), positions=(1,)) for _ in tasks]

    async def measure(self, tasks: Sequence[Task], count: int) -> list[list[float]]:
        return [[0.0, 1.0][:count] for _ in tasks]

    async def evaluate(self, tasks: Sequence[Task], wanted: HeldOut) -> list[RolloutTree]:
        await self.evaluating.wait()
        return [make_tree(task.id, version=wanted.policy_version, num_roots=wanted.num_samples) for task in tasks]

    async def router_stats(self) -> RouterStats:
        return RouterStats()

    async def watch(self) -> None:
        await asyncio.Event().wait()


def digest(before: str, trees: Sequence[RolloutTree]) -> str:
    """Weights of a model whose training depends on what it was, on the trees and on their order."""
    return xxhash.xxh3_64_hexdigest("\n".join([before, *map(tree_to_json, trees)]).encode())


class FakePredictor:
    def __init__(self) -> None:
        self.num_estimated = 0
        self.learnt = "predictor"

    async def estimate(self, task_ids: Sequence[str], queries: Sequence[PrefixQuery]) -> Estimates:
        await asyncio.sleep(0)
        self.num_estimated += len(task_ids)
        return Estimates(np.ones(len(task_ids)), np.ones(len(task_ids)))

    async def train(
        self, trees: Sequence[RolloutTree], policy_version: int, taught: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, float]:
        self.learnt = digest(self.learnt, trees)
        return {}

    async def taught(self) -> None:
        return None

    async def receive_weights(self, weights: Sequence[object]) -> int:
        (version,) = weights
        assert isinstance(version, int)
        return version

    async def checksum(self) -> str:
        return self.learnt

    async def save(self, folder: Path) -> None:
        folder.mkdir()  # noqa: ASYNC240
        (folder / "learnt").write_text(self.learnt)

    async def load(self, folder: Path) -> None:
        self.learnt = (folder / "learnt").read_text()


class FakeLearner:
    """`dies_at`: after so many updates the next one ends by the death of a rank, once for each entry.

    `holds_at`: after so many updates the next one says so (`held`) and does not end until `released` is set.
    """

    def __init__(self, dies_at: Sequence[int] = (), holds_at: int = -1) -> None:
        self.dies_at = list(dies_at)
        self.holds_at = holds_at
        self.held, self.released = asyncio.Event(), asyncio.Event()
        self.updates = 0
        self.sizes: list[int] = []
        self.learnt = "policy"
        self.loaded: Path | None = None

    async def update(self, trees: Sequence[RolloutTree], policy_version: int) -> dict[str, float]:
        if self.updates == self.holds_at:
            self.held.set()
            await self.released.wait()
        if self.updates in self.dies_at:
            self.dies_at.remove(self.updates)
            raise LearnerRankError("learner rank 1 died during update: killed")
        self.updates += 1
        self.sizes.append(sum(len(tree.rollouts) for tree in trees))
        self.learnt = digest(self.learnt, trees)
        return {"learner/updated": 1.0}

    async def checksum(self, weights: Sequence[object]) -> str:
        return self.learnt

    async def weights(self, policy_version: int) -> list[object]:
        return [policy_version]

    async def save(self, folder: Path) -> None:
        (folder / "updates").write_text(str(self.updates))
        (folder / "learnt").write_text(self.learnt)

    async def load(self, folder: Path) -> None:
        self.loaded = folder
        self.learnt = (folder / "learnt").read_text()
        self.updates = int((folder / "updates").read_text())

    async def export(self, target: Path) -> None:
        target.mkdir()  # noqa: ASYNC240  (as the real one, which refuses a folder that is there)
        (target / "updates").write_text(str(self.updates))


class FakePool:
    def __init__(self, num_generators: int = 1) -> None:
        self.ready: dict[str, object] = {f"generator-{index}": None for index in range(num_generators)}
        self.lent: dict[str, object] = {}
        self.loan_lost = asyncio.Event()
        self.target = num_generators
        self.num_lost = 0
        self.versions: list[int] = []

    async def resize(self, num_generators: int) -> None:
        self.target = num_generators
        self.ready = {f"generator-{index}": None for index in range(num_generators)}

    async def update_weights(self, weights: Sequence[object], policy_version: int, delta: object = None) -> float:
        self.versions.append(policy_version)
        return 1.0

    async def lend(self, num_generators: int) -> int:
        for name in list(self.ready)[max(1, len(self.ready) - num_generators) :]:
            self.lent[name] = self.ready.pop(name)
        self.loan_lost.clear()
        return len(self.lent)

    async def take_back(self) -> None:
        self.ready |= self.lent
        self.lent = {}

    async def stats(self) -> dict[str, GeneratorStats]:
        return {}


class FakeParts:
    """In the place of `actors.parts.Parts`."""

    def __init__(
        self, prompts: FakePrompts | None = None, learner: FakeLearner | None = None, num_generators: int = 1
    ) -> None:
        self.prompts = prompts or FakePrompts()
        self.learner = learner or FakeLearner()
        self.predictor = FakePredictor()
        self.pool = FakePool(num_generators)
        self.closed = False

    async def start(self) -> None:
        await asyncio.sleep(0)

    async def watch(self) -> None:
        await asyncio.Event().wait()

    async def close(self) -> None:
        self.closed = True
