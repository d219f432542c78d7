"""Held-out evaluation, inside a run or of a policy on its own.

        before the first update, after the last     on all generators; nothing else is to be done
        between updates (eval.every_updates)        on eval.num_generators of them, which are lent for it and keep the
                                                    weights of that update; training goes on with the others
        between updates, with one generator         training waits

An evaluation is entered under the update whose weights it is of, so its figures may come after those of later updates.
One runs at a time: when the next is due, it begins after the one before it has ended, and updates wait until then.

Example with 4 generators and eval.every_updates=10: after update 10 generator-3 is lent. Updates 11 to 17 are made with
the other three. Then the evaluation is done, its figures are entered under step 10, and generator-3 takes the weights
of update 17.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from actors.generators.pool import GeneratorPool
from actors.prompts.group import PromptGroup
from actors.prompts.prompt import HeldOut
from envs.tasks import heldout_tasks
from trace_async.config import Config
from trace_async.tracking.faults import FaultBook
from trace_async.tracking.heldout import heldout_figures
from trace_async.tracking.log import read_metrics
from trace_async.trees.io import heldout_path, write_trees
from trace_async.trees.tree import RolloutTree
from trace_async.types import Task

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Moment:
    """Which policy an evaluation is of, and how far the run was then."""

    num_updates: int = 0
    policy_version: int = 0
    elapsed_s: float = 0.0
    """Seconds of training."""
    generated_tokens: int = 0


class Players(Protocol):
    """What an evaluation asks of the PromptActors; see `PromptGroup`."""

    async def evaluate(self, tasks: Sequence[Task], wanted: HeldOut) -> Sequence[RolloutTree]:
        """Return one tree per task, in the order of the tasks."""
        ...


class Lender(Protocol):
    """What an evaluation asks of the pool; see `GeneratorPool`."""

    @property
    def ready(self) -> Mapping[str, object]:
        """Return the generators that training has, by name."""
        ...

    @property
    def loan_lost(self) -> asyncio.Event:
        """Return the event that is set when the last generator that was lent is gone."""
        ...

    async def lend(self, num_generators: int) -> int:
        """Lend up to so many generators until `take_back`. Returns how many."""
        ...

    async def take_back(self) -> None:
        """Give what was lent the current weights, and put it back to training."""
        ...


class Evaluations:
    """All evaluations of a session. Lives in the trainer's process; `run` goes on beside the updates."""

    def __init__(
        self,
        config: Config,
        tasks: Mapping[str, Sequence[Task]],
        prompts: Players,
        pool: Lender,
        faults: FaultBook,
        run_dir: Path,
        *,
        report: Callable[[int, Mapping[str, float]], None],
        doing: Callable[[str], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """`tasks`: those held out, by set (`envs.tasks.heldout_tasks`). `report`: takes the update and the figures of
        each evaluation that has ended. `doing`: notes what goes on within it (`Phases.during`)."""
        self.config = config
        self.tasks = tasks
        self.prompts = prompts
        self.pool = pool
        self.faults = faults
        self.run_dir = run_dir
        self.report = report
        self.doing = doing
        self.newest = -1
        """The newest update whose evaluation is reported or under way (-1: none)."""
        self._begun: asyncio.Queue[tuple[Moment, int]] = asyncio.Queue()

    def resume(self) -> None:
        """Take over from the run's log which update was evaluated last."""
        points = read_metrics(self.run_dir)
        heldout = (p.step for p in points if any(name.startswith("heldout/") for name in p.metrics))
        self.newest = max(heldout, default=-1)

    def due(self, num_updates: int) -> bool:
        """Return whether a multiple of `eval.every_updates` has come since the newest evaluation."""
        every = self.config.eval.every_updates
        return bool(every) and num_updates // every > self.newest // every

    async def begin(self, moment: Moment) -> bool:
        """Begin an evaluation beside training, once the one before it has ended.

        Returns False when no generator can be lent: then training has to wait for it (`play`).
        """
        await self.finish()
        num_lent = await self.pool.lend(self.config.eval.num_generators)
        if num_lent:
            self.newest = moment.num_updates
            self._begun.put_nowait((moment, num_lent))
        return num_lent > 0

    async def run(self) -> None:
        """Play what `begin` began, without end."""
        while True:
            moment, num_lent = await self._begun.get()
            share = num_lent / (num_lent + len(self.pool.ready))
            playing = asyncio.ensure_future(self.play(moment, share=share))
            lost = asyncio.ensure_future(self.pool.loan_lost.wait())
            try:
                await asyncio.wait((playing, lost), return_when=asyncio.FIRST_COMPLETED)
                if playing.done():
                    playing.result()
                else:
                    log.error(
                        "the evaluation of update %d is given up: the generator that kept its weights is lost; another "
                        "one begins after the update under way",
                        moment.num_updates,
                    )
                    self.newest = -1
            finally:
                for task in (playing, lost):
                    task.cancel()
                await asyncio.gather(playing, lost, return_exceptions=True)
            await self.pool.take_back()
            self._begun.task_done()

    async def finish(self) -> None:
        """Wait for the evaluation that runs beside training, if one does."""
        await self._begun.join()

    async def play(self, moment: Moment, *, share: float = 1.0) -> None:
        """Evaluate and report the figures. `share`: how much of all generators is there for it."""
        figures = await self.figures(moment, share=share)
        self.report(moment.num_updates, figures)
        self.newest = moment.num_updates

    async def figures(self, moment: Moment, *, share: float = 1.0) -> dict[str, float]:
        """Return the figures of one evaluation, and keep its trees for the viewer."""
        started = time.monotonic()
        figures: dict[str, float] = {}
        tokens = 0
        for set_name, temperature in itertools.product(self.tasks, self.config.eval.temperatures):
            with self.doing("eval"):
                trees = await self._trees(moment, set_name, temperature, share)
            for tree in trees:
                self.faults.enter(tree.faults)
            tokens += sum(tree.num_generated_tokens for tree in trees)
            found = heldout_figures(trees, temperature, self._num_samples(temperature))
            figures |= {_name_in(set_name, name): value for name, value in found.items()}
            if self.config.eval.keep_trees:
                path = heldout_path(self.run_dir, moment.num_updates, temperature, set_name)
                await asyncio.to_thread(write_trees, path, trees)
        return figures | {
            "tokens/eval": float(tokens),
            "tokens/generated_total": float(moment.generated_tokens),
            "time/eval_s": time.monotonic() - started,
            "time/elapsed_s": moment.elapsed_s,
        }

    def _num_samples(self, temperature: float) -> int:
        return self.config.eval.samples_per_task if temperature > 0 else 1

    async def _trees(self, moment: Moment, set_name: str, temperature: float, share: float) -> Sequence[RolloutTree]:
        wanted = HeldOut(
            temperature=temperature,
            num_samples=self._num_samples(temperature),
            policy_version=moment.policy_version,
            tasks_at_once=max(1, int(share * self.config.actors.prompts_per_actor)),
            set_name=set_name,
        )
        trees = await self.prompts.evaluate(self.tasks[set_name], wanted)
        return [_only_of(moment.policy_version, tree) for tree in trees]


def _name_in(set_name: str, name: str) -> str:
    """Return a figure's name: `heldout/success_t1.0` of the set `hotpot` becomes `eval/hotpot/success_t1.0`.

    The run's own set keeps its names.
    """
    return f"eval/{set_name}/{name.removeprefix('heldout/')}" if set_name else name


def _only_of(policy_version: int, tree: RolloutTree) -> RolloutTree:
    """Return the tree, without its rollouts if other weights wrote any of their tokens.

    This happens when a PromptActor hung and was not told of the loan. No such rollout may count for this version.
    """
    if {span.policy_version for node in tree.nodes for span in node.version_spans} <= {policy_version}:
        return tree
    return replace(tree, nodes=tree.nodes[:1], rollouts=(), failures={"other_policy_version": len(tree.rollouts)})


async def evaluate_policy(config: Config, policy_path: Path, log_dir: Path) -> dict[str, float]:
    """Return the held-out figures of the policy in `policy_path`. Ray must be started."""
    tasks = heldout_tasks(config)
    prompts = PromptGroup(config, policy_path, predictor=None)
    pool = GeneratorPool(config, policy_path, log_dir, prompts.announce)
    prompts.start()
    try:
        await pool.start()
        faults = FaultBook()
        evaluations = Evaluations(config, tasks, prompts, pool, faults, log_dir, report=lambda update, figures: None)
        return await evaluations.figures(Moment())
    finally:
        await pool.close()
        prompts.close()
