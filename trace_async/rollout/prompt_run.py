"""The story of one prompt: root rollouts, values of their prefixes, Stage 2, continuations, one finished tree.

        prompt ──► m root rollouts ──► values of their turns ──► Stage 2: counts per turn ──► continuations ──► tree

Nothing here waits for another prompt. A rollout whose environment breaks down is tried again from its anchor, then
dropped and counted by kind; it never becomes a reward. What breaks down in an engine is tried again by the router, one
request at a time (actors/router.py), and not here.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from trace_async.config import Config
from trace_async.engine import EngineError
from trace_async.env import AskingEnv, Env, EnvError, ReplayDivergedError
from trace_async.method.allocation import Anchor, find_anchors
from trace_async.rollout.renderer import Renderer
from trace_async.trees.tree import ROOT, Node, Rollout, RolloutKind, RolloutTree
from trace_async.types import Completion, PolicyTurn, PrefixQuery, SamplingParams, StepResult, Task

log = logging.getLogger(__name__)

Generate = Callable[[tuple[int, ...], SamplingParams], Awaitable[Completion]]
Value = Callable[[Sequence[PrefixQuery]], Awaitable[Sequence[np.ndarray]]]


class PlanPrefixes(Protocol):
    """Stage 2: how many of `budget` continuations each anchor gets."""

    def __call__(self, anchors: Sequence[Anchor], budget: int) -> np.ndarray: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutLimits:
    """Sampling of a turn, tokens of a whole context, and how often a broken rollout is tried again."""

    sampling: SamplingParams
    max_context_tokens: int
    max_retries: int


def rollout_limits(config: Config, stop_token_ids: tuple[int, ...], temperature: float) -> RolloutLimits:
    """What the config says of a rollout at `temperature`; at 0 (greedy) top-p and top-k say nothing."""
    sampling = config.sampling
    params = SamplingParams(
        temperature=temperature, max_new_tokens=sampling.max_turn_tokens, stop_token_ids=stop_token_ids
    )
    if temperature > 0:
        params = replace(params, top_p=sampling.top_p, top_k=sampling.top_k)
    return RolloutLimits(
        sampling=params,
        max_context_tokens=sampling.max_context_tokens,
        max_retries=config.actors.max_rollout_retries,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Expansion:
    """Stage 2 of a prompt: `per_root` continuations for every finished root rollout, spent in `rounds` rounds.

    `value` estimates the prefixes; `oracle_rollouts` > 0 measures them instead, each by so many continuations that do
    not enter the tree.
    """

    plan: PlanPrefixes
    per_root: int
    rounds: int = 1
    value: Value | None = None
    oracle_rollouts: int = 0


@dataclass(slots=True, eq=False)
class _Turn:
    """One turn of a rollout under way; `state` is the frozen environment after it (None: cannot be continued)."""

    token_ids: tuple[int, ...]
    completion: Completion
    state: Env | None = None
    value: float | None = None


@dataclass(slots=True, eq=False)
class _Chain:
    """One rollout under way: its fresh turns below `anchor` (a turn of another chain, or None for the prompt).

    `round`: the round of Stage 2 that bought it, as in `Rollout`.
    """

    kind: RolloutKind
    anchor: "tuple[_Chain, int] | None" = None
    round: int = 0
    turns: list[_Turn] = field(default_factory=list)
    reward: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)

    def history(self, prompt_ids: tuple[int, ...]) -> list[int]:
        """All tokens up to the end of the last turn."""
        above = list(prompt_ids)
        if self.anchor is not None:
            chain, turn = self.anchor
            above = _Chain(chain.kind, chain.anchor, turns=chain.turns[: turn + 1]).history(prompt_ids)
        return above + [token for turn in self.turns for token in turn.token_ids]


class PromptRun:
    """Grows the tree of one task; use `run_tree`."""

    def __init__(
        self,
        task: Task,
        make_env: Callable[[Task], Env],
        renderer: Renderer,
        generate: Generate,
        limits: RolloutLimits,
        *,
        keep_states: bool,
    ) -> None:
        self.task = task
        self.make_env = make_env
        self.renderer = renderer
        self.generate = generate
        self.limits = limits
        self.keep_states = keep_states
        self.prompt_ids: tuple[int, ...] = ()
        self.started: list[_Chain] = []
        self.finished: list[_Chain] = []
        self.failures: Counter[str] = Counter()

    async def roots(self, count: int) -> None:
        await _run_all(self._attempt("root", None) for _ in range(count))

    async def expand(self, expansion: Expansion) -> int:
        """Spend the prompt's continuation budget; returns how many continuations were allocated."""
        budget = expansion.per_root * len(self.finished)
        allocated = 0
        for rounds_left in range(expansion.rounds, 0, -1):
            if expansion.oracle_rollouts:
                await self._measure_values(expansion.oracle_rollouts)
            elif expansion.value is not None:
                await self._fill_values(expansion.value)
            turns = [(chain, turn) for chain in self.finished for turn in range(len(chain.turns))]
            # Node 0 is the prompt; the turns follow in the order in which `tree` lays them out. A turn without a state
            # is closed: its replay diverged.
            states = [None, *(chain.turns[turn].state for chain, turn in turns)]
            anchors = [anchor for anchor in find_anchors(self.tree()) if states[anchor.node] is not None]
            share = -(-(budget - allocated) // rounds_left)
            if not anchors or share == 0:
                break
            counts = expansion.plan(anchors, share)
            chosen = [turns[a.node - 1] for a, count in zip(anchors, counts, strict=True) for _ in range(int(count))]
            round_number = expansion.rounds - rounds_left
            await _run_all(self._attempt("continuation", anchor, round_number) for anchor in chosen)
            allocated += len(chosen)
        return allocated

    async def _fill_values(self, value: Value) -> None:
        """One forward per rollout gives the value at the end of each of its turns."""
        chains = [c for c in self.finished if any(t.value is None and t.state is not None for t in c.turns)]
        queries = []
        for chain in chains:
            tokens = chain.history(self.prompt_ids)
            ends = np.cumsum([len(turn.token_ids) for turn in chain.turns])
            start = len(tokens) - int(ends[-1])
            queries.append(PrefixQuery(token_ids=tuple(tokens), positions=tuple(int(start + end) for end in ends)))
        for chain, values in zip(chains, await value(queries), strict=True):
            for turn, estimate in zip(chain.turns, values, strict=True):
                turn.value = float(estimate)

    async def _measure_values(self, count: int) -> None:
        """V of every turn that can be continued: the mean outcome of `count` continuations from it."""
        scratch = {
            (chain, index): [_Chain("continuation", (chain, index)) for _ in range(count)]
            for chain in self.finished
            for index, turn in enumerate(chain.turns)
            if turn.value is None and turn.state is not None
        }
        played = [other for others in scratch.values() for other in others]
        self.started += played  # `close` frees their states
        await _run_all(self._measure(other) for other in played)
        for (chain, index), others in scratch.items():
            rewards = [other.reward for other in others if other.reward is not None]
            if rewards:
                chain.turns[index].value = float(np.mean(rewards))

    async def _measure(self, chain: _Chain) -> None:
        try:
            await self._roll(chain)
        except (EngineError, EnvError) as error:
            log.warning("task %s: a rollout of the oracle failed: %r", self.task.id, error)

    async def _attempt(self, kind: RolloutKind, anchor: tuple[_Chain, int] | None, round_number: int = 0) -> None:
        for attempt in range(self.limits.max_retries + 1):
            chain = _Chain(kind, anchor, round_number)
            self.started.append(chain)
            try:
                await self._roll(chain)
            except ReplayDivergedError as error:
                log.warning("task %s: nothing more is continued from this turn: %s", self.task.id, error)
                await _close_state(anchor)
                failure = error.loss
                break
            except (EngineError, EnvError) as error:
                log.warning("task %s: %s failed, attempt %d: %r", self.task.id, kind, attempt + 1, error)
                failure = error.loss
                if isinstance(error, EngineError):
                    break  # the router has tried this request on other generators already: tries never multiply
            else:
                self.finished.append(chain)
                return
        self.failures[failure] += 1

    async def _roll(self, chain: _Chain) -> None:
        """Play turns until the environment says done or the context is full."""
        if chain.anchor is None:
            env = self.make_env(self.task)
        else:
            state = chain.anchor[0].turns[chain.anchor[1]].state
            if state is None:
                raise ReplayDivergedError("an earlier continuation of the same turn found that it cannot be replayed")
            with _as_env_error("fork"):
                env = await state.fork()
        try:
            if chain.anchor is None:
                with _as_env_error("init"):
                    prompt_ids = self.renderer.render_prompt(await env.init())
                if self.prompt_ids and self.prompt_ids != prompt_ids:
                    raise EnvError("the task's prompt is another one than in its first rollout; it must not change")
                self.prompt_ids = prompt_ids
            history = chain.history(self.prompt_ids)
            while chain.reward is None:
                await self._turn(env, chain, history)
        finally:
            await env.close()

    async def _turn(self, env: Env, chain: _Chain, history: list[int]) -> None:
        room = self.limits.max_context_tokens - len(history)
        if room < 1:
            if not chain.turns:
                raise ValueError(
                    f"task {self.task.id}: its prompt of {len(history)} tokens leaves no room in "
                    f"sampling.max_context_tokens={self.limits.max_context_tokens}; raise it"
                )
            # The policy filled its context without an answer: its own doing, a reward of 0.
            chain.reward, chain.metrics = 0.0, {"overlong": 1.0}
            return
        completion = await self.generate(tuple(history), self._sampling(env, room))
        ended = bool(completion.token_ids) and completion.token_ids[-1] in self.renderer.stop_token_ids
        with _as_env_error("step"):
            result = await self._step(env, completion, ended)
        observed: tuple[int, ...] = ()
        if not result.done:
            observed = self.renderer.render_observation(result.messages, turn_ended=ended)
        turn = _Turn(completion.token_ids + observed, completion)
        chain.turns.append(turn)
        history.extend(turn.token_ids)
        if result.done:
            chain.reward, chain.metrics = result.reward, result.metrics
        elif self.keep_states and len(history) < self.limits.max_context_tokens:
            with _as_env_error("fork"):
                turn.state = await env.fork()

    def _sampling(self, env: Env, room: int) -> SamplingParams:
        """The run's sampling within what is left of the context and what the environment asks for."""
        sampling = self.limits.sampling
        most, stop = min(sampling.max_new_tokens, room), sampling.stop
        if isinstance(env, AskingEnv):
            asked = env.next_limits()
            most, stop = min(most, asked.max_new_tokens or most), (*stop, *asked.stop)
        return replace(sampling, max_new_tokens=most, stop=stop)

    async def _step(self, env: Env, completion: Completion, ended: bool) -> StepResult:
        text = self.renderer.decode(completion.token_ids)
        if not isinstance(env, AskingEnv):
            return await env.step(text, truncated=not ended)
        turn = PolicyTurn(
            text=text,
            truncated=not ended,
            completion=completion,
            decode=self.renderer.decode,
            message=self.renderer.read_message(completion.token_ids),
        )
        return await env.answer(turn)

    async def close(self) -> None:
        for chain in self.started:
            for turn in chain.turns:
                if turn.state is not None:
                    await turn.state.close()
                    turn.state = None

    def tree(
        self,
        *,
        policy_version: int = 0,
        num_roots: int = 0,
        num_continuations: int = 0,
        root_value: float | None = None,
    ) -> RolloutTree:
        """What is finished so far: the prompt, then each rollout's turns in the order in which rollouts ended."""
        nodes = [Node(parent=-1, rollout=-1, token_ids=self.prompt_ids, num_generated=0, value=root_value)]
        rollouts: list[Rollout] = []
        index: dict[tuple[_Chain, int], int] = {}
        for number, chain in enumerate(self.finished):
            anchor = ROOT if chain.anchor is None else index[chain.anchor]
            parent = anchor
            for position, turn in enumerate(chain.turns):
                nodes.append(_node(turn, parent, number))
                parent = index[chain, position] = len(nodes) - 1
            assert chain.reward is not None
            rollouts.append(
                Rollout(
                    kind=chain.kind,
                    anchor=anchor,
                    leaf=parent,
                    reward=chain.reward,
                    metrics=chain.metrics,
                    round=chain.round,
                )
            )
        return RolloutTree(
            task=self.task,
            nodes=tuple(nodes),
            rollouts=tuple(rollouts),
            policy_version_started=policy_version,
            num_roots_allocated=num_roots,
            num_continuations_allocated=num_continuations,
            failures=dict(self.failures),
        )


async def run_tree(
    task: Task,
    make_env: Callable[[Task], Env],
    renderer: Renderer,
    generate: Generate,
    limits: RolloutLimits,
    *,
    num_roots: int,
    expansion: Expansion | None = None,
    policy_version: int = 0,
    root_value: float | None = None,
) -> RolloutTree:
    """The whole life of one prompt. The tree has no rollouts when all broke down (`failures` says of what)."""
    run = PromptRun(task, make_env, renderer, generate, limits, keep_states=expansion is not None)
    try:
        await run.roots(num_roots)
        num_continuations = await run.expand(expansion) if expansion is not None else 0
        return run.tree(
            policy_version=policy_version,
            num_roots=num_roots,
            num_continuations=num_continuations,
            root_value=root_value,
        )
    finally:
        await run.close()


def _node(turn: _Turn, parent: int, rollout: int) -> Node:
    completion = turn.completion
    return Node(
        parent=parent,
        rollout=rollout,
        token_ids=turn.token_ids,
        num_generated=len(completion.token_ids),
        logprobs=completion.logprobs,
        version_spans=completion.version_spans,
        value=turn.value,
        prompt_tokens=completion.prompt_tokens,
        cached_tokens=completion.cached_tokens,
    )


async def _close_state(anchor: tuple[_Chain, int] | None) -> None:
    """Nothing can be continued from this turn any more."""
    if anchor is not None:
        turn = anchor[0].turns[anchor[1]]
        state, turn.state = turn.state, None
        if state is not None:
            await state.close()


@contextmanager
def _as_env_error(method: str) -> Iterator[None]:
    """What an environment's code raises is its own break-down: dropped and counted, never the end of the run."""
    try:
        yield
    except EnvError:
        raise
    except Exception as error:
        raise EnvError(f"the environment's {method}() raised {error!r}") from error


async def _run_all(attempts: Iterable[Coroutine[None, None, None]]) -> None:
    """All at once; when one raises, the others are cancelled and its error is raised plainly."""
    try:
        async with asyncio.TaskGroup() as group:
            for attempt in attempts:
                group.create_task(attempt)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
