"""PromptActor: hosts prompts, each a coroutine that goes from Stage 1 to Stage 2 without waiting for any other."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import ray
from ray.actor import ActorHandle

from actors.calls import PromptLostError
from actors.generators.router import GeneratorRouter, Generators, RouterStats
from actors.predictors.group import Answering
from actors.predictors.handle import Predictor
from envs import load_domain
from trace_async.config import Config
from trace_async.env import EnvError
from trace_async.method.anchors import Anchor
from trace_async.method.registry import stage2_rule
from trace_async.policy.load import load_renderer
from trace_async.predictor.heads import Heads
from trace_async.rollout.expansion import Expansion
from trace_async.rollout.grower import Grower, make_grower
from trace_async.rollout.guard import EnvGuard, make_guard
from trace_async.run.state import PendingPrompt
from trace_async.trees.tree import RolloutTree
from trace_async.types import Completion, LossKind, PrefixQuery, SamplingParams, Task
from trace_async.weights import WeightUpdate

log = logging.getLogger(__name__)
T = TypeVar("T")

MAX_QUESTIONS = 64
"""Candidates whose environments are started at a time, to render their prompts for Stage 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """How held-out tasks are played, and with which weights."""

    temperature: float
    """Sampling temperature. 0: greedy."""
    num_samples: int
    """Rollouts of each task, the roots of one tree."""
    policy_version: int
    """The version that the generators for evaluation serve; every tree is stamped with it."""
    tasks_at_once: int
    """Tasks that one PromptActor plays at a time."""
    set_name: str = ""
    """Of which of `eval.sets` the tasks are; empty: of the run's own environment."""


class PromptActor:
    """A Ray actor with one event loop; `actors.prompts_per_actor` prompts at a time."""

    def __init__(self, config: Config, policy_path: str, predictor: Predictor | Answering | None) -> None:
        self.config = config
        self.domain = load_domain(config.env)
        self.renderer = load_renderer(
            policy_path,
            max_observation_tokens=config.sampling.max_observation_tokens,
            template_kwargs=config.policy.chat_template_kwargs,
        )
        self.predictor = predictor
        self.heads: Heads | None = None
        self.router, self.evaluation_router = (
            GeneratorRouter(
                wait_s=config.engine.start_timeout_s,
                max_retries=config.actors.max_rollout_retries,
            )
            for _ in range(2)
        )
        self.grower = make_grower(
            config,
            self.domain,
            self.renderer,
            self._generate,
            playing=lambda task: self.router.playing(task.id),
        )
        self.evaluators = {"": self._evaluator(self.grower.guard)}
        # A call that never returns is seen from a thread beside the loop; PromptGroup replaces an actor that hangs.
        self.grower.guard.watch.patrol(config.env.step_timeout_s, _say_held)
        self.slots = asyncio.Semaphore(config.actors.prompts_per_actor)
        # Of their own: Stage 1 goes on while every slot holds a prompt that grows.
        self.questions = asyncio.Semaphore(MAX_QUESTIONS)

    def _evaluator(self, guard: EnvGuard) -> Grower:
        return Grower(
            guard,
            self.renderer,
            self._generate_held_out,
            self.grower.limits,
            playing=lambda task: self.evaluation_router.playing(task.id),
        )

    def __repr__(self) -> str:
        """Return the name under which Ray's dashboard and logs show the actor."""
        return f"{self.config.name} prompts"

    async def announce(self, generators: Generators, loads_of_others: Mapping[str, int]) -> dict[str, int]:
        """Take over the generators and how many rollouts other PromptActors have on each; return one's own."""
        self.router.announce(generators.ready, loads_of_others)
        self.evaluation_router.announce(generators.for_evaluation)
        return dict(self.router.loads)

    async def take_learnt(self, learnt: WeightUpdate) -> None:
        """Say V with these heads from now on, wherever the engine gave the states (predictor.trunk=policy)."""
        self.heads = Heads.unpacked(learnt)

    async def router_stats(self) -> RouterStats:
        return self.router.stats()

    async def run_prompt(self, task: Task, prompt: PendingPrompt) -> RolloutTree:
        """Grow the tree of one prompt; it has no rollouts when all broke down.

        Raises PromptLostError when it outruns `actors.tree_timeout_s`, counted from when it has one of the slots.
        """
        async with self.slots:
            limit = asyncio.timeout(self.config.actors.tree_timeout_s)
            try:
                async with limit:
                    with self.router.hosting(task.id):
                        return await self._grow(task, prompt)
            except TimeoutError:
                if not limit.expired():
                    raise
                raise PromptLostError(LossKind.TREE_TIMEOUT) from None

    async def _grow(self, task: Task, prompt: PendingPrompt) -> RolloutTree:
        settings = self.config.budget
        rng = np.random.default_rng(prompt.seed)

        rule = stage2_rule(settings, prompt.offer)

        def plan(anchors: Sequence[Anchor], budget: int) -> np.ndarray:
            return rule.spend(anchors, budget, rng)

        expansion = Expansion(
            plan=plan,
            per_root=settings.continuations_per_root,
            rounds=settings.stage2_rounds,
            value=self._values if rule.needs_values else None,
            oracle_rollouts=settings.oracle_rollouts if rule.needs_values else 0,
            forks=rule.forks,
            buys_roots=rule.buys_roots,
            root_strength=prompt.root_strength,
        )
        return await self.grower.grow(
            task,
            prompt.num_roots,
            expansion if (rule.forks or rule.buys_roots) and settings.continuations_per_root else None,
            policy_version=prompt.policy_version,
            root_value=prompt.root_value,
        )

    async def evaluate(self, tasks: Sequence[Task], wanted: HeldOut) -> list[RolloutTree]:
        """Return one tree per task, of root rollouts that nobody trains on. They take no slot of a growing prompt."""
        if wanted.set_name not in self.evaluators:
            env = self.config.env_of(wanted.set_name)
            self.evaluators[wanted.set_name] = self._evaluator(make_guard(env, load_domain(env)))
        evaluator = self.evaluators[wanted.set_name]

        async def play(task: Task) -> RolloutTree:
            with self.evaluation_router.hosting(task.id):
                return await evaluator.grow(
                    task, wanted.num_samples, policy_version=wanted.policy_version, temperature=wanted.temperature
                )

        return await _at_once(tasks, play, asyncio.Semaphore(wanted.tasks_at_once))

    async def measure(self, tasks: Sequence[Task], count: int) -> list[list[float]]:
        """Return the rewards of `count` rollouts per task: V(prompt) as the oracle knows it."""

        async def play(task: Task) -> list[float]:
            with self.router.hosting(task.id):
                return await self.grower.measure(task, count)

        return await _at_once(tasks, play, self.slots)

    async def prompt_queries(self, tasks: Sequence[Task]) -> list[PrefixQuery | LossKind]:
        """Return the predictor's question about every task's prompt: its tokens, all of them.

        A LossKind stands where the environment broke down in every try: that candidate is left out.
        """

        async def ask(task: Task) -> PrefixQuery | LossKind:
            try:
                return await self.grower.ask(task)
            except EnvError as error:
                log.warning("task %s is no candidate: %s", task.id, error)
                return error.loss

        return await _at_once(tasks, ask, self.questions)

    async def _generate(self, task: Task, prompt_ids: tuple[int, ...], params: SamplingParams) -> Completion:
        return await self.router.generate(task.id, prompt_ids, params)

    async def _generate_held_out(self, task: Task, prompt_ids: tuple[int, ...], params: SamplingParams) -> Completion:
        return await self.evaluation_router.generate(task.id, prompt_ids, params)

    async def _values(self, queries: Sequence[PrefixQuery]) -> Sequence[np.ndarray]:
        if self.heads is not None and all(query.states for query in queries):
            return self.heads.prefix_values(queries)
        assert self.predictor is not None
        return await self.predictor.values(queries)


def _say_held(where: str, seconds: float) -> None:
    log.error(
        "%s has kept all other prompts of its process waiting for %.0f s and goes on; see env.blocking", where, seconds
    )


async def _at_once(tasks: Sequence[Task], call: Callable[[Task], Awaitable[T]], slots: asyncio.Semaphore) -> list[T]:
    async def one(task: Task) -> T:
        async with slots:
            return await call(task)

    return list(await asyncio.gather(*map(one, tasks)))


def remote_prompt_actor(config: Config, policy_path: str, predictor: Predictor | Answering | None) -> ActorHandle:
    """Start a PromptActor in a process of its own."""
    actor = ray.remote(PromptActor).options(
        num_cpus=0,  # it waits most of the time (`ray_cluster.asked_of_ray`)
        max_concurrency=8192,  # prompts wait for `slots` in the actor, and not in Ray
        enable_task_events=False,  # see remote_generator
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
    )
    return actor.remote(config, policy_path, predictor)
