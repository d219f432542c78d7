"""Finished trees waiting for the learner, and the staleness bound.

The bound: a tree admitted at learner version v is trained at a version ≤ v + max_staleness. It is kept by order: an
update takes every tree that is due, waiting for those still growing, before it fills up with others, oldest first. No
tree is ever dropped for being late. Admission keeps the load even (see rounds.py), so that what is due at an update is
about one update's worth.
"""

from dataclasses import dataclass, field

from trace_async.trees.tree import RolloutTree


def finished_roots(tree: RolloutTree) -> int:
    """Return the root rollouts of Stage 1 that were not lost: M of them make an update, whatever Stage 2 adds."""
    return sum(rollout.from_stage1 for rollout in tree.rollouts)


@dataclass(slots=True)
class TreeBuffer:
    """Finished trees, and which admitted prompts are still growing."""

    roots_per_update: int
    """An update takes trees of so many finished root rollouts (M), or all there is."""
    max_staleness: int
    """Weight versions that a tree may lag when it is trained on."""
    waiting: list[RolloutTree] = field(default_factory=list)
    """Finished trees."""
    growing: dict[int, int] = field(default_factory=dict)
    """Ticket of a prompt → learner version at its admission."""

    def admit(self, ticket: int, policy_version: int) -> None:
        """Note that a prompt grows from now on."""
        self.growing[ticket] = policy_version

    def finish(self, ticket: int, tree: RolloutTree | None) -> None:
        """Take in a prompt that has ended. None, or a tree without rollouts: nothing of it is to be trained on."""
        del self.growing[ticket]
        if tree is not None and tree.rollouts:
            self.waiting.append(tree)

    def ready(self, policy_version: int, *, more_to_come: bool) -> bool:
        """Return whether an update can be taken now. `more_to_come`: another prompt can be admitted at this version."""
        due = any(version + self.max_staleness <= policy_version for version in self.growing.values())
        if due or not self.waiting:
            return False
        return self.waiting_roots >= self.roots_per_update or not (self.growing or more_to_come)

    def exhausted(self) -> bool:
        """Return whether nothing waits and nothing grows."""
        return not self.waiting and not self.growing

    def take(self, policy_version: int, *, everything: bool = False) -> list[RolloutTree]:
        """Return the trees of one update, oldest first; only when `ready`. `everything`: all, for the last update."""
        self.waiting.sort(key=lambda tree: tree.policy_version_started)
        taken, roots = 0, 0
        while taken < len(self.waiting) and (
            everything or roots < self.roots_per_update or self._due(taken, policy_version)
        ):
            roots += finished_roots(self.waiting[taken])
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
    def waiting_roots(self) -> int:
        return sum(finished_roots(tree) for tree in self.waiting)

    @property
    def num_waiting_rollouts(self) -> int:
        return sum(len(tree.rollouts) for tree in self.waiting)
