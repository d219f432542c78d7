"""PromptActor: hosts prompts, each a coroutine that goes from Stage 1 to Stage 2 without waiting for any other."""

import asyncio
from collections.abc import Mapping, Sequence

import numpy as np
import ray
from ray.actor import ActorHandle

from actors.generator import GeneratorRouter
from envs import load_domain
from trace_async.config import Config
from trace_async.method.allocation import VALUE_FREE_RULES, Anchor, plan_prefixes
from trace_async.policy.load import load_tokenizer
from trace_async.rollout.prompt_run import Expansion, RolloutLimits, rollout_limits, run_tree
from trace_async.rollout.renderer import Renderer
from trace_async.run.state import PendingPrompt
from trace_async.tracking.metrics import EvalRollout
from trace_async.trees.tree import RolloutTree
from trace_async.types import PrefixQuery, Task


class PromptActor:
    """A Ray actor with one event loop; `actors.prompts_per_actor` prompts at a time."""

    def __init__(self, config: Config, policy_path: str, predictor: ActorHandle | None) -> None:
        self.config = config
        self.domain = load_domain(config.env)
        limit = config.sampling.max_observation_tokens
        self.renderer = Renderer(load_tokenizer(policy_path), max_observation_tokens=limit)
        self.predictor = predictor
        self.router = GeneratorRouter(
            spill_requests=config.actors.spill_requests,
            wait_s=config.engine.start_timeout_s,
            max_retries=config.actors.max_rollout_retries,
        )
        self.slots = asyncio.Semaphore(config.actors.prompts_per_actor)

    async def announce(self, generators: Mapping[str, ActorHandle]) -> None:
        self.router.announce(generators)

    async def run_prompt(self, task: Task, prompt: PendingPrompt) -> RolloutTree:
        """Grow the tree of one prompt; it has no rollouts when all broke down."""
        settings = self.config.budget
        rng = np.random.default_rng(prompt.seed)

        def plan(anchors: Sequence[Anchor], budget: int) -> np.ndarray:
            return plan_prefixes(settings, anchors, budget, rng)

        needs_values = settings.stage2 not in VALUE_FREE_RULES
        oracle_rollouts = settings.oracle_rollouts if needs_values else 0
        expansion = Expansion(
            plan=plan,
            per_root=settings.continuations_per_root,
            rounds=settings.stage2_rounds,
            value=self._values if needs_values else None,
            oracle_rollouts=oracle_rollouts,
        )
        async with self.slots:
            return await run_tree(
                task,
                self.domain.make_env,
                self.renderer,
                lambda prompt_ids, params: self.router.generate(task.id, prompt_ids, params),
                self._limits(self.config.sampling.temperature),
                num_roots=prompt.num_roots,
                expansion=expansion if settings.stage2 != "none" and settings.continuations_per_root else None,
                policy_version=prompt.policy_version,
                root_value=prompt.root_value,
            )

    async def evaluate(self, tasks: Sequence[Task], temperature: float) -> list[EvalRollout]:
        """One rollout per task, all at once within the actor's slots."""
        return list(await asyncio.gather(*(self._evaluate(task, temperature) for task in tasks)))

    async def measure(self, tasks: Sequence[Task], count: int) -> list[list[float]]:
        """The rewards of `count` rollouts per task: V(prompt) as the oracle knows it."""
        return list(await asyncio.gather(*(self._measure(task, count) for task in tasks)))

    async def _measure(self, task: Task, count: int) -> list[float]:
        tree = await self._roots(task, count, self.config.sampling.temperature)
        return [rollout.reward for rollout in tree.rollouts]

    async def prompt_queries(self, tasks: Sequence[Task]) -> list[PrefixQuery]:
        """The predictor's question for every task's prompt: its tokens, all of them."""
        return [await self._prompt_query(task) for task in tasks]

    async def _prompt_query(self, task: Task) -> PrefixQuery:
        env = self.domain.make_env(task)
        try:
            prompt_ids = self.renderer.render_prompt(await env.init())
        finally:
            await env.close()
        return PrefixQuery(token_ids=prompt_ids, positions=(len(prompt_ids),))

    async def _roots(self, task: Task, count: int, temperature: float) -> RolloutTree:
        """Root rollouts that nobody trains on."""
        async with self.slots:
            return await run_tree(
                task,
                self.domain.make_env,
                self.renderer,
                lambda prompt_ids, params: self.router.generate(task.id, prompt_ids, params),
                self._limits(temperature),
                num_roots=count,
            )

    async def _evaluate(self, task: Task, temperature: float) -> EvalRollout:
        tree = await self._roots(task, 1, temperature)
        rollout = tree.rollouts[0] if tree.rollouts else None
        return EvalRollout(
            task_id=task.id,
            domain=task.domain,
            kind=task.kind,
            reward=rollout.reward if rollout else None,
            metrics=rollout.metrics if rollout else {},
            generated_tokens=tree.num_generated_tokens,
            num_turns=len(tree.nodes) - 1,
            error=", ".join(tree.failures),
        )

    async def _values(self, queries: Sequence[PrefixQuery]) -> Sequence[np.ndarray]:
        assert self.predictor is not None
        return await self.predictor.values.remote(list(queries))

    def _limits(self, temperature: float) -> RolloutLimits:
        return rollout_limits(self.config, self.renderer.stop_token_ids, temperature)


def remote_prompt_actor(config: Config, policy_path: str, predictor: ActorHandle | None) -> ActorHandle:
    actor = ray.remote(PromptActor).options(
        num_cpus=0, max_concurrency=8192, runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}}
    )
    return actor.remote(config, policy_path, predictor)
