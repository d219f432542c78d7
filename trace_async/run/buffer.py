"""Finished trees waiting for the learner, the staleness bound, and the ledger of the budget.

The bound: a tree admitted at learner version v is trained at a version ≤ v + max_staleness. It is kept by order: an
update takes every tree that is due, waiting for those still growing, before it fills up with others, oldest first. No
tree is ever dropped for being late. Admission keeps the load even: a round of M roots starts only while fewer than
(updates + max_staleness + 1)·M were admitted, so that what is due at an update is about one update's worth.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from trace_async.trees.tree import RolloutTree


@dataclass(slots=True)
class Ledger:
    """Where every allocated root rollout and continuation went. Continuations are entered when their tree arrives.

    At any moment allocated = trained + failed + waiting in the buffer + in flight (`check`).
    """

    allocated: Counter[str] = field(default_factory=Counter)
    trained: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    filtered: Counter[str] = field(default_factory=Counter)

    def allocate_roots(self, count: int) -> None:
        self.allocated["root"] += count

    def arrive(self, tree: RolloutTree) -> None:
        """A prompt has ended: its continuations become known, and what broke down is entered by kind."""
        self.allocated["continuation"] += tree.num_continuations_allocated
        lost = sum(tree.failures.values())
        done = len(tree.rollouts)
        expected = tree.num_roots_allocated + tree.num_continuations_allocated
        assert done + lost == expected, f"task {tree.task.id}: {done} finished + {lost} failed of {expected} rollouts"
        for kind, count in tree.failures.items():
            self.failed[kind] += count

    def lose_tree(self, num_roots: int, kind: str) -> None:
        """A whole prompt was lost (its actor died, it outran its limit): its roots failed."""
        self.failed[kind] += num_roots

    def train(self, tree: RolloutTree) -> None:
        self.trained.update(rollout.kind for rollout in tree.rollouts)

    def filter(self, tree: RolloutTree) -> None:
        """The selection rule leaves the tree out (DAPO: its rollouts agree); it was generated and is charged."""
        self.filtered.update(rollout.kind for rollout in tree.rollouts)

    def check(self, *, waiting: int, in_flight_roots: int) -> None:
        """The sums must be equal: rollouts waiting in the buffer and roots of prompts under way included."""
        allocated = sum(self.allocated.values())
        found = sum(self.trained.values()) + sum(self.failed.values()) + waiting + in_flight_roots
        found += sum(self.filtered.values())
        assert allocated == found, (
            f"ledger: {allocated} rollouts allocated, but {dict(self.trained)} trained + {dict(self.failed)} failed + "
            f"{dict(self.filtered)} filtered + {waiting} waiting + {in_flight_roots} in flight = {found}"
        )

    def state(self) -> dict[str, dict[str, int]]:
        return {name: dict(getattr(self, name)) for name in ("allocated", "trained", "failed", "filtered")}

    @classmethod
    def from_state(cls, state: Mapping[str, Mapping[str, int]]) -> "Ledger":
        return cls(**{name: Counter(counts) for name, counts in state.items()})


@dataclass(slots=True)
class TreeBuffer:
    """Finished trees, and which admitted prompts are still growing.

    `roots_per_update`: an update takes trees of so many allocated root rollouts (M), or all there is.
    """

    roots_per_update: int
    max_staleness: int
    waiting: list[RolloutTree] = field(default_factory=list)
    growing: dict[int, int] = field(default_factory=dict)  # prompt ticket → version at admission

    def may_admit(self, admitted_roots: int, num_updates: int) -> bool:
        """Whether another round may start; `admitted_roots`: of all rounds so far, less those that were filtered."""
        return admitted_roots < (num_updates + self.max_staleness + 1) * self.roots_per_update

    def admit(self, ticket: int, policy_version: int) -> None:
        self.growing[ticket] = policy_version

    def finish(self, ticket: int, tree: RolloutTree | None) -> None:
        """A prompt has ended; `None` or a tree without rollouts: all of it was lost."""
        del self.growing[ticket]
        if tree is not None and tree.rollouts:
            self.waiting.append(tree)

    def ready(self, policy_version: int, *, more_to_come: bool) -> bool:
        """Whether an update can be taken now. `more_to_come`: another round can be admitted at this version."""
        due = any(version + self.max_staleness <= policy_version for version in self.growing.values())
        if due or not self.waiting:
            return False
        full = sum(tree.num_roots_allocated for tree in self.waiting) >= self.roots_per_update
        return full or not (self.growing or more_to_come)

    def exhausted(self) -> bool:
        """Nothing waits and nothing grows."""
        return not self.waiting and not self.growing

    def take(self, policy_version: int) -> list[RolloutTree]:
        """The trees of one update, oldest first; call only when `ready`."""
        self.waiting.sort(key=lambda tree: tree.policy_version_started)
        taken, roots = 0, 0
        while taken < len(self.waiting) and (roots < self.roots_per_update or self._due(taken, policy_version)):
            roots += self.waiting[taken].num_roots_allocated
            taken += 1
        trees, self.waiting = self.waiting[:taken], self.waiting[taken:]
        for tree in trees:
            assert policy_version - tree.oldest_policy_version <= self.max_staleness, (
                f"task {tree.task.id} began at version {tree.oldest_policy_version}, older than max_staleness="
                f"{self.max_staleness} allows at version {policy_version}"
            )
        return trees

    def _due(self, index: int, policy_version: int) -> bool:
        return self.waiting[index].policy_version_started + self.max_staleness <= policy_version

    @property
    def num_waiting_rollouts(self) -> int:
        return sum(len(tree.rollouts) for tree in self.waiting)
