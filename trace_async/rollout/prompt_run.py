"""The story of one prompt: root rollouts, values of their prefixes, Stage 2, continuations, one finished tree.

        prompt ──► m root rollouts ──► values of their turns ──► Stage 2: counts per turn ──► continuations ──► tree

The tree grows in place (`TreeBuilder`); beside it stand the frozen environments, by the node after which they stood
still. Nothing here waits for another prompt. A rollout whose environment breaks down is tried again from its anchor,
then dropped and counted by kind; it never becomes a reward. What breaks down in an engine is tried again by the router,
one request at a time (actors/generators/router.py), and not here.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import numpy as np

from trace_async.engine import EngineError
from trace_async.env import EnvError, EnvValueError, PromptTooLongError, ReplayDivergedError
from trace_async.method.anchors import Anchor, find_anchors, prompt_anchor
from trace_async.printable import printable
from trace_async.rollout.context import place_context
from trace_async.rollout.expansion import Expansion, Value
from trace_async.rollout.guard import EnvGuard, GuardedEnv, named
from trace_async.rollout.limits import RolloutLimits
from trace_async.rollout.renderer import MAX_CHARS_PER_TOKEN, Renderer
from trace_async.rollout.values import shown_task
from trace_async.trees.builder import Branch, TreeBuilder
from trace_async.trees.tree import ROOT, Fault, RolloutKind, RolloutTree
from trace_async.types import (
    Completion,
    LossKind,
    Message,
    PolicyTurn,
    PrefixQuery,
    Prompt,
    SamplingParams,
    StepResult,
    Task,
)

log = logging.getLogger(__name__)

Generate = Callable[[Task, tuple[int, ...], SamplingParams], Awaitable[Completion]]
Playing = Callable[[Task], AbstractContextManager[None]]
"""What is entered while a rollout of the task is under way, for whoever counts them."""


def uncounted(task: Task) -> AbstractContextManager[None]:
    """Count nothing: the `Playing` of whoever does not ask."""
    return nullcontext()


@dataclass(frozen=True, slots=True)
class _Outcome:
    """How a rollout ended, in the verifier's words."""

    reward: float
    metrics: Mapping[str, float] = field(default_factory=dict)


class _Lap:
    """How long each turn of a rollout takes: `seconds` since it was asked last."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    def seconds(self) -> float:
        before, self._since = self._since, time.monotonic()
        return self._since - before


class PromptRun:
    """Grows the tree of one task: `roots`, `expand`, `tree`, and `close` at the end whatever happened."""

    def __init__(
        self,
        task: Task,
        guard: EnvGuard,
        renderer: Renderer,
        generate: Generate,
        limits: RolloutLimits,
        *,
        keep_states: bool,
        root_value: float | None = None,
        playing: Playing = uncounted,
    ) -> None:
        self._task = task
        self._guard = guard
        self._renderer = renderer
        self._generate = generate
        self._limits = limits
        self._keep_states = keep_states
        self._playing = playing
        self._builder = TreeBuilder(shown_task(task), root_value=root_value)
        self._states: dict[int, GuardedEnv] = {}
        self._failures: Counter[LossKind] = Counter()
        self._faults: dict[str, Fault] = {}

    async def roots(self, count: int) -> None:
        """Play `count` root rollouts from the prompt."""
        await _run_all(self._attempt("root", ROOT) for _ in range(count))

    async def expand(self, expansion: Expansion) -> int:
        """Spend what Stage 2 may; returns how many rollouts it bought."""
        budget = expansion.per_root * len(self._builder.rollouts)
        allocated = 0
        for round_number in range(expansion.rounds):
            if expansion.oracle_rollouts:
                await self._measure_values(expansion.oracle_rollouts)
            elif expansion.value is not None:
                await self._ask_values(expansion.value)
            anchors = self._anchors(expansion)
            share = -(-(budget - allocated) // (expansion.rounds - round_number))
            if not anchors or share <= 0:  # a rule may have spent more than its share
                break
            counts = expansion.plan(anchors, share)
            chosen = [anchor.node for anchor, count in zip(anchors, counts, strict=True) for _ in range(int(count))]
            await _run_all(
                self._attempt("root", ROOT, round_number + 1)
                if node == ROOT
                else self._attempt("continuation", node, round_number)
                for node in chosen
            )
            allocated += len(chosen)
        return allocated

    def _anchors(self, expansion: Expansion) -> list[Anchor]:
        # A turn whose replay diverged has no state any more: nothing can be continued from it.
        found = [anchor for anchor in find_anchors(self._builder) if anchor.node in self._states]
        if not expansion.buys_roots:
            return found
        roots = [rollout for rollout in self._builder.rollouts if rollout.kind == "root"]
        written = sum(
            self._builder.nodes[n].num_generated for rollout in roots for n in self._builder.path(rollout.leaf)
        )
        prompt = prompt_anchor(
            [rollout.reward for rollout in roots],
            value=self._builder.nodes[ROOT].value,
            strength=expansion.root_strength,
            expected_tokens=written / max(1, len(roots)),
        )
        return found if prompt is None else [prompt, *found]

    def tree(self, policy_version: int, num_roots: int, num_continuations: int) -> RolloutTree:
        return self._builder.tree(
            policy_version=policy_version,
            num_roots=num_roots,
            num_continuations=num_continuations,
            failures={str(kind): count for kind, count in self._failures.items()},
            faults=self._faults | self._guard.take_notes(),
        )

    async def close(self) -> None:
        for state in self._states.values():
            await state.close()
        self._states.clear()

    async def _close_state(self, node: int) -> None:
        state = self._states.pop(node, None)
        if state is not None:
            await state.close()

    async def _ask_values(self, value: Value) -> None:
        """Ask one question per conversation: the value at the end of each of its turns that can be continued."""
        builder = self._builder
        missing = [node for node in self._states if builder.nodes[node].value is None]
        rollouts = sorted({builder.nodes[node].rollout for node in missing})
        asked = [chain for rollout in rollouts for chain in self._conversations(rollout)]
        queries = []
        for path, nodes in asked:
            tokens = tuple(token for node in path for token in builder.nodes[node].token_ids)
            ends = np.cumsum([len(builder.nodes[node].token_ids) for node in path])[-len(nodes) :]
            logprobs = tuple(builder.nodes[node].logprobs for node in path if node != ROOT)
            positions = tuple(int(end) for end in ends)
            states = tuple(builder.states[node] for node in nodes if node in builder.states)
            if len(states) < len(nodes):
                states = ()
            queries.append(
                PrefixQuery(
                    token_ids=tokens,
                    positions=positions,
                    turn_logprobs=logprobs,
                    states=states,
                    prompt_value=builder.nodes[ROOT].value,
                )
            )
        for (_, nodes), values in zip(asked, await value(queries), strict=True):
            for node, estimate in zip(nodes, values, strict=True):
                if node in self._states:
                    builder.set_value(node, float(estimate))

    async def _measure_values(self, count: int) -> None:
        """Measure V of every turn that can be continued: the mean outcome of `count` continuations from it."""
        rewards: dict[int, list[float]] = {node: [] for node in self._states if self._builder.nodes[node].value is None}
        await _run_all(self._measure(node, found) for node, found in rewards.items() for _ in range(count))
        for node, found in rewards.items():
            if found:
                self._builder.set_value(node, float(np.mean(found)))

    async def _measure(self, node: int, rewards: list[float]) -> None:
        """Play a rollout of the oracle, which leaves its reward in `rewards` and nothing in the tree."""
        try:
            outcome, states = await self._play(Branch("continuation", node), keep_states=False)
        except (EngineError, EnvError) as error:
            self._note(error)
        else:
            assert not states
            rewards.append(outcome.reward)

    async def _attempt(self, kind: RolloutKind, anchor: int, round_number: int = 0) -> None:
        """Play one allocated rollout. It enters the tree, or is counted as failed once all its tries broke down."""
        for _ in range(self._limits.max_retries + 1):
            branch = Branch(kind, anchor, round_number)
            try:
                outcome, states = await self._play(branch, keep_states=self._keep_states)
            except (EngineError, EnvError) as error:
                failure = self._note(error)
                if isinstance(error, ReplayDivergedError):
                    await self._close_state(anchor)
                # An engine's failure was tried on other generators already (tries never multiply), and the others would
                # only come again.
                if isinstance(error, EngineError | ReplayDivergedError | PromptTooLongError):
                    break
            else:
                nodes = self._builder.add(branch, outcome.reward, outcome.metrics)
                self._states.update((nodes[turn], state) for turn, state in states.items())
                return
        self._failures[failure] += 1

    def _note(self, error: EngineError | EnvError) -> LossKind:
        """Count what broke down; returns its kind."""
        name = f"{error.method if isinstance(error, EnvError) else 'generate'}.{error.loss}"
        if name not in self._faults:
            log.warning("%s: %s", name, error)
        before = self._faults.get(name, Fault(0, str(error)))
        self._faults[name] = replace(before, count=before.count + 1)
        return error.loss

    async def _play(self, branch: Branch, *, keep_states: bool) -> tuple[_Outcome, dict[int, GuardedEnv]]:
        """Play turns until the environment says done or the context is full.

        Returns the frozen environments by turn of the branch; when it breaks down they are closed.
        """
        with self._playing(self._task):
            return await self._play_counted(branch, keep_states)

    async def _play_counted(self, branch: Branch, keep_states: bool) -> tuple[_Outcome, dict[int, GuardedEnv]]:
        states: dict[int, GuardedEnv] = {}
        clock = _Lap()
        env = await (self._fork_at(branch.anchor) if branch.anchor != ROOT else self._guard.make(self._task))
        try:
            if branch.anchor == ROOT:
                await self._start(env)
            history = self._builder.history(branch)
            while (outcome := await self._turn(env, branch, history, clock)) is None:
                if keep_states and len(history) < self._limits.max_context_tokens:
                    states[len(branch.turns) - 1] = await env.fork()
        except BaseException:
            for state in states.values():
                await state.close()
            raise
        finally:
            await env.close()
        return outcome, states

    async def _fork_at(self, node: int) -> GuardedEnv:
        if node not in self._states:
            raise ReplayDivergedError("an earlier continuation of this turn could not be replayed", method="fork")
        return await self._states[node].fork()

    async def _start(self, env: GuardedEnv) -> None:
        """Take the task's prompt from `env`, or hold what it says against what was taken before."""
        prompt_ids = start_prompt(self._task, await env.init(), self._renderer, self._limits)
        if self._builder.prompt_ids and self._builder.prompt_ids != prompt_ids:
            raise EnvError(
                f"{named(self._task)}: init() gives another prompt than before; a task's prompt must not change",
                method="init",
            )
        self._builder.set_prompt(prompt_ids)

    async def _turn(self, env: GuardedEnv, branch: Branch, history: list[int], clock: "_Lap") -> _Outcome | None:
        """Play one turn of the policy, and hear what the environment says to it.

        `history`, what the policy sees, grows by both, or becomes that of another conversation of the rollout.
        """
        room = self._limits.max_context_tokens - len(history)
        if room < 1:
            # The policy filled its context without an answer: its own doing, a reward of 0.
            return _Outcome(0.0, {"overlong": 1.0})
        completion = await self._generate(self._task, tuple(history), await self._sampling(env, room))
        ended = bool(completion.token_ids) and completion.token_ids[-1] in self._renderer.stop_token_ids
        turn = PolicyTurn(
            text=self._renderer.decode(completion.token_ids),
            truncated=not ended,
            completion=completion,
            decode=self._renderer.decode,
            message=self._renderer.read_message(completion.token_ids),
        )
        result = await env.step(turn)
        follows_another = result.prompt is not None or result.after is not None
        observed: tuple[int, ...] = ()
        if not result.done:
            result = self._readable(result)
        if not result.done and not follows_another:
            with _template_errors(self._task, "step"):
                observed = self._renderer.render_observation(result.messages, turn_ended=ended)
        branch.append(completion, observed, clock.seconds())
        if result.reward is not None:
            return _Outcome(result.reward, result.metrics)
        if follows_another:
            with _template_errors(self._task, "step"):
                context = place_context(self._builder.line(branch), result, self._renderer)
            branch.append_context(context.follows, context.token_ids)
            history[:] = self._builder.history(branch)
        else:
            history.extend((*completion.token_ids, *observed))
        return None

    def _conversations(self, rollout: int) -> list[tuple[list[int], list[int]]]:
        """Return two lists of nodes for each conversation of a rollout; most rollouts have one conversation.

        The first holds the nodes whose tokens the policy saw, up to the last that can be continued. The second is the
        end of the first, from the first node on that can be continued.
        """
        left = {node for node in self._builder.fresh_nodes(rollout) if node in self._states}
        found = []
        for node in sorted(left, reverse=True):
            if node in left:
                path = self._builder.token_path(node)
                first = next(number for number, index in enumerate(path) if index in left)
                found.append((path, path[first:]))
                left.difference_update(path)
        return found

    def _readable(self, result: StepResult) -> StepResult:
        """Cut texts to what the context can hold, so that of many megabytes only the beginning is tokenised."""
        most = self._limits.max_context_tokens * MAX_CHARS_PER_TOKEN

        def cut(messages: Sequence[Message]) -> tuple[Message, ...]:
            return tuple(replace(message, content=message.content[:most]) for message in messages)

        if result.prompt is not None:
            return replace(result, prompt=replace(result.prompt, messages=cut(result.prompt.messages)))
        return replace(result, messages=cut(result.messages))

    async def _sampling(self, env: GuardedEnv, room: int) -> SamplingParams:
        """Return the run's sampling within what is left of the context and what the environment asks for."""
        sampling = self._limits.sampling
        asked = await env.next_limits()
        most = min(sampling.max_new_tokens, room)
        return replace(
            sampling, max_new_tokens=min(most, asked.max_new_tokens or most), stop=(*sampling.stop, *asked.stop)
        )


def start_prompt(task: Task, prompt: Prompt, renderer: Renderer, limits: RolloutLimits) -> tuple[int, ...]:
    """Return the prompt's tokens. Raises PromptTooLongError where they leave no room for a turn.

    Raises EnvValueError where the chat template refuses the messages.
    """
    num_chars = sum(len(message.content) for message in prompt.messages)
    most = limits.max_context_tokens * MAX_CHARS_PER_TOKEN
    length = f"{num_chars} characters"
    if num_chars <= most:
        with _template_errors(task, "init"):
            prompt_ids = renderer.render_prompt(prompt)
        if len(prompt_ids) < limits.max_context_tokens:
            return prompt_ids
        length = f"{len(prompt_ids)} tokens"
    raise PromptTooLongError(
        f"{named(task)}: its prompt of {length} leaves no room in "
        f"sampling.max_context_tokens={limits.max_context_tokens}; raise it, or leave the task out",
        method="init",
    )


@contextmanager
def _template_errors(task: Task, method: str) -> Iterator[None]:
    """Turn what the chat template refuses (a role, a tool's schema) into an error of the environment that gave it."""
    try:
        yield
    except ValueError as error:
        raise EnvValueError(f"{named(task)}: {method}(): {printable(str(error), 2_000)}", method=method) from error


async def _run_all(attempts: Iterable[Coroutine[None, None, None]]) -> None:
    """Run all at once. When one raises, the others are cancelled and its error is raised plainly."""
    try:
        async with asyncio.TaskGroup() as group:
            for attempt in attempts:
                group.create_task(attempt)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
