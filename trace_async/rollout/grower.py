"""The grower: everything that is asked of tasks and their environments, for training, evaluation and studies alike.

        grow      prompt ─► m root rollouts ─► values of their turns ─► Stage 2 ─► continuations ─► tree
        measure   the rewards of some rollouts
        ask       the prompt alone, as Stage 1 shows it to the predictor

No prompt waits for another. A rollout that breaks down through no fault of the policy is tried again from its anchor,
then dropped and counted by kind; it never becomes a reward.
"""

from collections import OrderedDict
from dataclasses import replace

from trace_async.config import Config
from trace_async.env import Domain, EnvError, PromptTooLongError
from trace_async.rollout.expansion import Expansion
from trace_async.rollout.guard import EnvGuard, make_guard
from trace_async.rollout.limits import RolloutLimits, rollout_limits
from trace_async.rollout.prompt_run import Generate, Playing, PromptRun, start_prompt, uncounted
from trace_async.rollout.renderer import Renderer
from trace_async.trees.tree import RolloutTree
from trace_async.types import PrefixQuery, Task


class Grower:
    """Plays tasks of one domain with one policy. `limits`: of rollouts in training. `playing`: see `Playing`."""

    def __init__(
        self,
        guard: EnvGuard,
        renderer: Renderer,
        generate: Generate,
        limits: RolloutLimits,
        *,
        playing: Playing = uncounted,
    ) -> None:
        self.guard = guard
        self.renderer = renderer
        self.generate = generate
        self.limits = limits
        self.playing = playing
        self._prompts = _Prompts()

    async def grow(
        self,
        task: Task,
        num_roots: int,
        expansion: Expansion | None = None,
        *,
        policy_version: int = 0,
        root_value: float | None = None,
        temperature: float | None = None,
    ) -> RolloutTree:
        """Live the whole life of one prompt. Its tree has no rollouts when all broke down (`failures` says of what)."""
        run = PromptRun(
            task,
            self.guard,
            self.renderer,
            self.generate,
            self.limits if temperature is None else self.limits.at(temperature),
            keep_states=expansion is not None and expansion.forks,
            root_value=root_value,
            playing=self.playing,
        )
        try:
            await run.roots(num_roots)
            num_continuations = await run.expand(expansion) if expansion is not None else 0
            return run.tree(policy_version, num_roots, num_continuations)
        finally:
            await run.close()

    async def measure(self, task: Task, count: int) -> list[float]:
        """Return the rewards of `count` rollouts, fewer where some broke down: V(prompt) as an oracle knows it."""
        tree = await self.grow(task, count)
        return [rollout.reward for rollout in tree.rollouts]

    async def ask(self, task: Task) -> PrefixQuery:
        """Return the predictor's question about the task's prompt: its tokens, all of them. Raises EnvError."""
        prompt_ids = self._prompts.get(task.id)
        if prompt_ids is None:
            prompt_ids = await self._render(task)
            self._prompts.put(task.id, prompt_ids)
        return PrefixQuery(token_ids=prompt_ids, positions=(len(prompt_ids),))

    async def _render(self, task: Task) -> tuple[int, ...]:
        for attempt in range(self.limits.max_retries + 1):
            try:
                env = await self.guard.make(task)
                try:
                    return start_prompt(task, await env.init(), self.renderer, self.limits)
                finally:
                    await env.close()
            except EnvError as error:
                self.guard.note(f"{error.method}.{error.loss}", str(error))
                if isinstance(error, PromptTooLongError) or attempt == self.limits.max_retries:
                    raise
        raise AssertionError("the last try returns or raises")


class _Prompts:
    """The prompts that were rendered last, by task, up to so many tokens in all: rounds come back to the same tasks."""

    def __init__(self, max_tokens: int = 1_000_000) -> None:
        self._max_tokens = max_tokens
        self._num_tokens = 0
        self._known: OrderedDict[str, tuple[int, ...]] = OrderedDict()

    def get(self, task_id: str) -> tuple[int, ...] | None:
        if task_id in self._known:
            self._known.move_to_end(task_id)
        return self._known.get(task_id)

    def put(self, task_id: str, prompt_ids: tuple[int, ...]) -> None:
        self._num_tokens += len(prompt_ids) - len(self._known.get(task_id, ()))
        self._known[task_id] = prompt_ids
        while self._num_tokens > self._max_tokens:
            self._num_tokens -= len(self._known.popitem(last=False)[1])


def make_grower(
    config: Config,
    domain: Domain,
    renderer: Renderer,
    generate: Generate,
    *,
    max_retries: int | None = None,
    playing: Playing = uncounted,
) -> Grower:
    """Make a grower as the config says. `max_retries`: in place of `actors.max_rollout_retries`."""
    limits = rollout_limits(config, renderer.stop_token_ids)
    if max_retries is not None:
        limits = replace(limits, max_retries=max_retries)
    return Grower(make_guard(config.env, domain), renderer, generate, limits, playing=playing)
