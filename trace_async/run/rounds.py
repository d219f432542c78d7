"""The books of a run and every decision of its loop, without a clock, an await or an actor.

    next candidates ─► Stage 1 ─► planned ─► growing ─► waiting ─► in training ─► trained
                                                │  └──► filtered (by the rule of Stage 1)
                                                └─────► lost (counted by kind, and replaced)

How M, the pool and the price are kept. A round is what the method says: `pool_size` fresh candidates, and exactly M
root rollouts bought among them by Stage 1, at the price at which its knapsack cuts. But its prompts do not start
together. They start one by one as capacity comes free, and when few of them are left, the next round is planned. So M
of every `pool_size` candidates are bought, and an estimate is at most about a round old when its prompt starts.

When a prompt may start. Outstanding roots (growing, waiting or in training) stay below (max_staleness + 1)·M: more
could not be trained in time. With max_staleness ≥ 1 at most max_staleness·M of them *grow* at a time. All that grew at
the last version is due before an update can be taken. So the more of it there is, the longer the learner waits for the
last one, while admission is at its bound and the generators stand idle; the less there is, the smaller are the engine's
batches. What was lost or filtered is outstanding no more, so others take its place and updates keep their size.

Example, M = 64, max_staleness = 1, prompts of 4: sixteen prompts (64 roots) start; whenever one ends the next starts;
after 64 roots have ended an update is taken; during it prompts go on starting until 128 roots are outstanding.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trace_async.run.buffer import TreeBuffer, finished_roots
from trace_async.run.ledger import in_words
from trace_async.run.state import PendingPrompt, PlannedPrompt, RunState, SavedTrainer
from trace_async.trees.tree import RolloutTree
from trace_async.types import LossKind

MAX_UPDATES_WITHOUT_CREDIT = 20
MAX_UPDATES_NOT_FINITE = 5
MAX_LOST_POOLS = 5


class NothingToLearnError(RuntimeError):
    """The run goes nowhere: nearly everything breaks down, or no prompt has both outcomes. The message says which."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLimits:
    """What a run may spend."""

    roots_per_update: int
    """M, root rollouts of one round of Stage 1 and of one update."""
    max_staleness: int
    """Weight versions that a tree may lag when it is trained on."""
    num_updates: int
    """The run ends after so many updates …"""
    max_generated_tokens: int = 0
    """… or when so many tokens were generated (0: no such limit)."""

    @property
    def growing_roots(self) -> int:
        """Roots that may grow at a time: all of a round when synchronous, else all that may be ahead of the learner."""
        return max(1, self.max_staleness) * self.roots_per_update


@dataclass(slots=True)
class _SinceUpdate:
    """What has ended since the last update. Not in checkpoints: after a resume nothing of before counts as new."""

    finished: int = 0
    failed: int = 0
    filtered: int = 0


class Rounds:
    """Owns the run's counters, its plan and its trees. Whoever awaits something tells it, then asks what may happen."""

    def __init__(self, limits: RunLimits, position: Mapping[str, int]) -> None:
        """`position`: where the data stands before the first round (TaskIterator.state)."""
        self.limits = limits
        self.state = RunState()
        self.planned: deque[PlannedPrompt] = deque()
        self.pending: dict[int, PendingPrompt] = {}
        self.buffer = TreeBuffer(limits.roots_per_update, limits.max_staleness)
        self._position = dict(position)
        self._roots_in_training = 0
        self._pools_all_lost = 0
        self._since_update = _SinceUpdate()

    # ── Stage 1 ──────────────────────────────────────────────────────────────────────────────────────────────────

    def wants_round(self) -> bool:
        """Return whether to plan the next round now: little of the last one is left, and its first may start."""
        planned = sum(prompt.num_roots for prompt in self.planned)
        if self.limits.max_staleness and 4 * planned >= self.limits.roots_per_update:
            return False
        return not self.spent() and self.outstanding_roots + planned < self._outstanding_limit

    def add_round(self, prompts: Sequence[PlannedPrompt], position: Mapping[str, int]) -> None:
        """Enter a planned round; `position`: where the data stands after its candidates were drawn."""
        self.planned.extend(prompts)
        self._position = dict(position)
        self.state.num_rounds += 1

    def lose_candidates(self, kinds: Sequence[LossKind], *, of: int) -> None:
        """Enter the candidates of a pool of `of` that could not be started. Nothing is allocated to them.

        Raises NothingToLearnError when that is all of several pools in a row.
        """
        self.state.lost_candidates.update(kinds)
        self._pools_all_lost = self._pools_all_lost + 1 if len(kinds) == of else 0
        if self._pools_all_lost >= MAX_LOST_POOLS:
            raise NothingToLearnError(
                f"in {MAX_LOST_POOLS} pools in a row none of {of} candidates could be started: "
                f"{in_words(self.state.lost_candidates)}; try `trace-async env check` on env.name"
            )

    # ── prompts ──────────────────────────────────────────────────────────────────────────────────────────────────

    def may_start(self) -> bool:
        """Return whether the next planned prompt may start now."""
        return bool(self.planned) and self._room() and self.growing_roots < self.limits.growing_roots

    def start(self) -> tuple[int, PendingPrompt]:
        """Start the next planned prompt, at the current version; returns its ticket. Only when `may_start`."""
        assert self.may_start()
        plan = self.planned.popleft()
        prompt = PendingPrompt(
            task_id=plan.task_id,
            num_roots=plan.num_roots,
            policy_version=self.state.policy_version,
            root_value=plan.root_value,
            root_strength=plan.root_strength,
            seed=plan.seed,
        )
        ticket = self.state.num_prompts
        self.state.num_prompts += 1
        self.state.ledger.allocate_roots(prompt.num_roots)
        self.pending[ticket] = prompt
        self.buffer.admit(ticket, prompt.policy_version)
        return ticket, prompt

    def arrive(self, ticket: int, tree: RolloutTree, *, keep: bool = True) -> None:
        """Enter a prompt that has ended. `keep` false: the rule of Stage 1 filters it out, though it is charged."""
        del self.pending[ticket]
        self.state.ledger.arrive(tree)
        self.state.generated_tokens += tree.num_generated_tokens
        self._since_update.failed += sum(tree.failures.values())
        self._since_update.finished += len(tree.rollouts)
        if tree.rollouts and not keep:
            self.state.ledger.filter(tree)
            self._since_update.filtered += len(tree.rollouts)
        self.buffer.finish(ticket, tree if keep else None)

    def lose(self, ticket: int, kind: LossKind) -> None:
        """Enter a prompt that has ended without a tree."""
        num_roots = self.pending.pop(ticket).num_roots
        self.state.ledger.lose_tree(num_roots, kind)
        self._since_update.failed += num_roots
        self.buffer.finish(ticket, None)

    # ── updates ──────────────────────────────────────────────────────────────────────────────────────────────────

    def ready(self) -> bool:
        """Return whether an update can be taken now. The last one waits for all that grows and takes all there is."""
        if self._is_last and (self.pending or self._more_to_come()):
            return False
        return self.buffer.ready(self.state.policy_version, more_to_come=self._more_to_come())

    def take(self) -> list[RolloutTree]:
        """Return the trees of the next update, oldest first; only when `ready`. `account` must follow."""
        trees = self.buffer.take(self.state.policy_version, everything=self._is_last)
        self._roots_in_training = sum(map(finished_roots, trees))
        return trees

    def account(
        self, trees: Sequence[RolloutTree], *, updated: bool, finite: bool = True, elapsed_s: float = 0.0
    ) -> None:
        """Enter a finished update. Without a token of credit no weight has changed, and the version stays.

        `finite` false: a step of it was left out, since its loss or gradient was not finite.
        """
        state = self.state
        for tree in trees:
            state.ledger.train(tree)
        self._roots_in_training = 0
        state.num_updates += 1
        state.policy_version += updated
        state.updates_not_finite = 0 if finite else state.updates_not_finite + 1
        if finite:
            state.updates_without_credit = 0 if updated else state.updates_without_credit + 1
        state.elapsed_s += elapsed_s
        self._since_update = _SinceUpdate()
        self.check_ledger()

    def finished(self) -> bool:
        """Return whether nothing is left to train on and nothing more will come."""
        done = self.state.num_updates >= self.limits.num_updates
        return done or (self.spent() and self.buffer.exhausted() and not self._roots_in_training)

    def spent(self) -> bool:
        """Return whether the run's updates are done or its tokens generated, so that nothing more is started."""
        limit = self.limits.max_generated_tokens
        done = self.state.num_updates >= self.limits.num_updates
        return done or 0 < limit <= self.state.generated_tokens

    # ── what must hold ───────────────────────────────────────────────────────────────────────────────────────────

    def check_ledger(self) -> None:
        """Assert that every allocated rollout is somewhere; not between `take` and `account`."""
        self.state.ledger.check(waiting=self.buffer.num_waiting_rollouts, in_flight_roots=self.growing_roots)

    def check_worth(self, hint: str) -> None:
        """Raise NothingToLearnError when going on is pointless, judged by what has ended since the last update only.

        `hint`: where the causes can be read.
        """
        since, per_update = self._since_update, self.limits.roots_per_update
        if since.failed >= 4 * per_update and since.failed >= 0.9 * (since.failed + since.finished):
            raise NothingToLearnError(
                f"nearly every rollout breaks down: {since.failed} failed and {since.finished} finished since the last "
                f"update; in the whole run {in_words(self.state.ledger.failed)}. The causes are in {hint}"
            )
        if since.filtered >= MAX_UPDATES_WITHOUT_CREDIT * per_update and since.filtered == since.finished:
            raise NothingToLearnError(self._no_contrast(f"of {since.filtered} rollouts since the last update"))
        if self.state.updates_not_finite >= MAX_UPDATES_NOT_FINITE:
            raise NothingToLearnError(
                f"loss or gradient was not finite in {self.state.updates_not_finite} updates in a row; the weights are "
                "those of before. Lower learner.learning_rate, or look at learner/mismatch_max: an engine whose "
                f"log-probabilities are not the learner's is broken. The causes are in {hint}"
            )
        if self.state.updates_without_credit >= MAX_UPDATES_WITHOUT_CREDIT:
            raise NothingToLearnError(self._no_contrast(f"in {self.state.updates_without_credit} updates in a row"))

    def _no_contrast(self, where: str) -> str:
        return (
            f"{where} no prompt had both outcomes: nothing can be learnt from these tasks with this policy; see "
            "train/reward, and choose easier or harder tasks (env.args)"
        )

    # ── checkpoints ──────────────────────────────────────────────────────────────────────────────────────────────

    def snapshot(self) -> SavedTrainer:
        """Return what a checkpoint keeps, between updates. Nothing of it changes afterwards."""
        assert not self._roots_in_training, "a checkpoint is taken between updates"
        return SavedTrainer(
            state=self.state.copy(),
            dataset=dict(self._position),
            planned=list(self.planned),
            pending=dict(self.pending),
            waiting=list(self.buffer.waiting),
        )

    def restore(self, saved: SavedTrainer) -> None:
        """Go on from a snapshot. Its pending prompts are to be grown again, under their tickets."""
        self.state = saved.state.copy()
        self.state.updates_without_credit = self.state.updates_not_finite = 0  # after a resume nothing of before counts
        self._position = dict(saved.dataset)
        self.planned = deque(saved.planned)
        self.pending = dict(saved.pending)
        self.buffer.waiting = list(saved.waiting)
        self.buffer.growing = {ticket: prompt.policy_version for ticket, prompt in saved.pending.items()}
        self._roots_in_training = 0
        self._since_update = _SinceUpdate()

    # ── counts ───────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def growing_roots(self) -> int:
        return sum(prompt.num_roots for prompt in self.pending.values())

    @property
    def outstanding_roots(self) -> int:
        """Return how many roots have started and are neither trained nor lost nor filtered."""
        return self.growing_roots + self.buffer.waiting_roots + self._roots_in_training

    @property
    def _outstanding_limit(self) -> int:
        """Return the bound of outstanding roots; near the end, what the updates that are left can take."""
        updates = min(self.limits.max_staleness + 1, self.limits.num_updates - self.state.num_updates)
        return updates * self.limits.roots_per_update

    @property
    def _is_last(self) -> bool:
        return self.state.num_updates + 1 >= self.limits.num_updates

    def _room(self) -> bool:
        return not self.spent() and self.outstanding_roots < self._outstanding_limit

    def _more_to_come(self) -> bool:
        """Return whether a further prompt can start before the next update, now or when a growing one has ended."""
        return self._room()
