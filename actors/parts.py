"""The actors of a run: made together, watched together, closed together."""

import asyncio
import logging
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path

from actors.calls import CallError
from actors.generators.pool import GeneratorPool
from actors.learner import LearnerGroup
from actors.predictors.group import PredictorGroup
from actors.predictors.handle import Predictor
from actors.prompts.group import PromptGroup
from trace_async.config import Config

log = logging.getLogger(__name__)
CLOSE_LIMIT_S = 60.0


@dataclass(slots=True)
class Parts:
    """What a trainer works with. Tests put plain asyncio objects in their places."""

    learner: LearnerGroup
    predictor: Predictor | PredictorGroup
    prompts: PromptGroup
    pool: GeneratorPool

    @classmethod
    def make(cls, config: Config, run_dir: Path, policy_path: Path) -> "Parts":
        """Make the parts of a run. Nothing runs yet but the predictor, which takes longest to start."""
        checkpoints = run_dir / "checkpoints"
        predictor: Predictor | PredictorGroup
        if config.predictor.num_replicas or config.predictor_trunk == "policy":
            predictor = PredictorGroup.start(config, policy_path, checkpoints)
            prompts = PromptGroup(config, policy_path, predictor.answering)
            if config.predictor_trunk == "policy":
                predictor.share = prompts.take_learnt
        else:  # one actor that needs nothing from outside when Ray starts it anew
            predictor = Predictor.start(config, policy_path, checkpoints)
            prompts = PromptGroup(config, policy_path, predictor)
        pool = GeneratorPool(config, policy_path, run_dir / "logs", prompts.announce)
        return cls(LearnerGroup(config, policy_path), predictor, prompts, pool)

    async def start(self) -> None:
        """Start all of them, and return when they are ready. Raises what the first one that failed said."""
        self.prompts.start()
        await asyncio.gather(self.pool.start(), self.learner.start(), self.predictor.ready())

    async def watch(self) -> None:
        """Watch over the parts that have started, beside all that uses them.

        Generators and PromptActors that die or hang are replaced; a predictor that was started anew is brought up to
        date. This ends only by an error of the watches themselves.
        """
        assert self.pool.watching is not None, "the pool starts its watch"
        watches = [asyncio.shield(self.pool.watching), self.prompts.watch()]
        if isinstance(self.predictor, PredictorGroup):
            watches.append(self.predictor.watch())
        await asyncio.gather(*watches)

    async def close(self) -> None:
        """Stop everything. A part that does not close is only warned of, so that the others close too."""
        await asyncio.gather(_closed(self.pool.close()), _closed(self.learner.close()))
        self.prompts.close()
        self.predictor.close()


async def _closed(closing: Awaitable[None]) -> None:
    try:
        await asyncio.wait_for(closing, CLOSE_LIMIT_S)
    except (CallError, TimeoutError) as error:
        log.warning("while closing: %r", error)
