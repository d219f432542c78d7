"""Whether choosing where to expand by the outcome biases a node's value: chosen against fresh, fresh against fresh."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trace_async.method.knapsack import FloatArray
from trace_async.trees.tree import RolloutTree


@dataclass(frozen=True, slots=True)
class ExpandedNodes:
    """Nodes with continuations, arrays [nodes].

    `value`: the predictor's (nan: none); `chosen`: reward of the rollout that passed there; `fresh`: mean reward of the
    continuations; `pooled`: of both together; `split`: the first continuation's reward minus the mean of the others
    (nan: only one).
    """

    value: FloatArray
    chosen: FloatArray
    fresh: FloatArray
    pooled: FloatArray
    split: FloatArray

    def gaps(self) -> dict[str, float]:
        """Mean gaps among nodes with value < .5 (`low`) and ≥ .5 (`high`), with standard errors; nan: no such node.

        A fair procedure shows a gap only in `chosen` (its outcome was looked at) and in what pools it with the fresh
        ones, never between fresh and fresh. Apart by value, because TRACE picks successes where V is low and failures
        where it is high: over all nodes the two cancel.
        """
        found = {}
        for name, inside in (("low", self.value < 0.5), ("high", self.value >= 0.5)):
            differences = {
                "chosen_minus_fresh": self.chosen - self.fresh,
                "pooled_minus_fresh": self.pooled - self.fresh,
                "fresh_minus_fresh": self.split,
            }
            for kind, gap in differences.items():
                some = gap[inside & ~np.isnan(gap)]
                found[f"{kind}/{name}"] = float(some.mean()) if len(some) else float("nan")
                found[f"{kind}/{name}_se"] = float(some.std() / len(some) ** 0.5) if len(some) else float("nan")
        return found


def expanded_nodes(trees: Sequence[RolloutTree]) -> ExpandedNodes:
    """Return all nodes of `trees` at which continuations are anchored."""
    rows = []
    for tree in trees:
        fresh: dict[int, list[float]] = {}
        for rollout in tree.rollouts:
            if rollout.kind == "continuation":
                fresh.setdefault(rollout.anchor, []).append(rollout.reward)
        for anchor, rewards in fresh.items():
            node = tree.nodes[anchor]
            value = float("nan") if node.value is None else node.value
            chosen = tree.rollouts[node.rollout].reward
            split = rewards[0] - np.mean(rewards[1:]) if len(rewards) > 1 else float("nan")
            rows.append((value, chosen, np.mean(rewards), np.mean([chosen, *rewards]), split))
    return ExpandedNodes(*np.array(rows, dtype=float).reshape(len(rows), 5).T)
