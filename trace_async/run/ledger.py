"""The ledger of the budget: where every allocated rollout went."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from trace_async.trees.tree import RolloutTree
from trace_async.types import LossKind


def in_words(counts: Mapping[str, int]) -> str:
    """Return counts in words: `2 env_error, 5 tree_timeout`."""
    return ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "none"


@dataclass(slots=True)
class Ledger:
    """Where every allocated root rollout and continuation went.

    What Stage 2 bought is entered when its tree arrives, all of it as continuations. At any moment
    allocated = trained + failed + filtered + waiting in the buffer + in flight (`check`).
    """

    allocated: Counter[str] = field(default_factory=Counter)
    """By kind of rollout."""
    trained: Counter[str] = field(default_factory=Counter)
    """By kind of rollout."""
    failed: Counter[str] = field(default_factory=Counter)
    """By kind of loss."""
    filtered: Counter[str] = field(default_factory=Counter)
    """By kind of rollout."""

    def allocate_roots(self, count: int) -> None:
        self.allocated["root"] += count

    def arrive(self, tree: RolloutTree) -> None:
        """Enter a prompt that has ended: its continuations become known, and what broke down is counted by kind."""
        self.allocated["continuation"] += tree.num_continuations_allocated
        lost = sum(tree.failures.values())
        done = len(tree.rollouts)
        expected = tree.num_roots_allocated + tree.num_continuations_allocated
        assert done + lost == expected, f"task {tree.task.id}: {done} finished + {lost} failed of {expected} rollouts"
        for kind, count in tree.failures.items():
            self.failed[kind] += count

    def lose_tree(self, num_roots: int, kind: LossKind) -> None:
        """Enter a prompt that was lost whole (its actor died, it outran its limit): its roots failed."""
        self.failed[kind] += num_roots

    def train(self, tree: RolloutTree) -> None:
        self.trained.update(rollout.kind for rollout in tree.rollouts)

    def filter(self, tree: RolloutTree) -> None:
        """Enter a tree that the selection rule leaves out (DAPO: its rollouts agree). It is charged all the same."""
        self.filtered.update(rollout.kind for rollout in tree.rollouts)

    def check(self, *, waiting: int, in_flight_roots: int) -> None:
        """Assert that the sums are equal, rollouts waiting in the buffer and roots of prompts under way included."""
        allocated = sum(self.allocated.values())
        found = sum(self.trained.values()) + sum(self.failed.values()) + waiting + in_flight_roots
        found += sum(self.filtered.values())
        assert allocated == found, (
            f"ledger: {allocated} rollouts allocated, but trained: {in_words(self.trained)}; failed: "
            f"{in_words(self.failed)}; filtered: {in_words(self.filtered)}; {waiting} waiting and "
            f"{in_flight_roots} in flight, together {found}"
        )

    def state(self) -> dict[str, dict[str, int]]:
        return {name: dict(getattr(self, name)) for name in ("allocated", "trained", "failed", "filtered")}

    @classmethod
    def from_state(cls, state: Mapping[str, Mapping[str, int]]) -> "Ledger":
        return cls(**{name: Counter(counts) for name, counts in state.items()})
