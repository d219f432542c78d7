"""Rules that give every chosen prompt the same number of rollouts: `budget.uniform_rollouts` (n, the group size)."""

import numpy as np

from trace_async.method.knapsack import FloatArray, IntArray, fill_in_order
from trace_async.method.posterior import Estimates
from trace_async.method.stage1.rule import Stage1Rule
from trace_async.trees.tree import RolloutTree


class Uniform(Stage1Rule):
    """GRPO: the first prompts of the pool, which was drawn at random, get n rollouts each.

    What does not fill a group goes to the next prompt if it is at least 2, else on top of the first prompts, as it
    does when the pool is too small for the budget.
    """

    needs_estimates = False

    def plan(self, estimates: Estimates, num_roots: int, rng: np.random.Generator) -> IntArray:
        return groups(
            np.arange(estimates.size), num_roots, group=self.settings.uniform_rollouts, cap=self.settings.max_rollouts
        )


class WarmUp(Stage1Rule):
    """The first `budget.warmup_rounds` rounds of a rule that needs estimates: small groups show more prompts."""

    needs_estimates = False

    def plan(self, estimates: Estimates, num_roots: int, rng: np.random.Generator) -> IntArray:
        return groups(
            np.arange(estimates.size), num_roots, group=self.settings.warmup_rollouts, cap=self.settings.max_rollouts
        )


class Dapo(Uniform):
    """DAPO's dynamic sampling (arXiv 2503.14476): go on until the batch is full of prompts with both outcomes."""

    def trains_on(self, tree: RolloutTree) -> bool:
        return tree.has_both_outcomes


class Pcl(Stage1Rule):
    """PCL (arXiv 2510.01135): n rollouts for each of the candidates whose estimated success is nearest 0.5."""

    def plan(self, estimates: Estimates, num_roots: int, rng: np.random.Generator) -> IntArray:
        return self._nearest_half(estimates.mean, num_roots)

    def _nearest_half(self, success: FloatArray, num_roots: int) -> IntArray:
        order = np.argsort(np.abs(success - 0.5), kind="stable")
        return groups(order, num_roots, group=self.settings.uniform_rollouts, cap=self.settings.max_rollouts)


class Thompson(Pcl):
    """The Thompson sampling of MoPPS (arXiv 2507.04632), target 0.5: as `Pcl`, with one draw from each posterior."""

    def plan(self, estimates: Estimates, num_roots: int, rng: np.random.Generator) -> IntArray:
        return self._nearest_half(rng.beta(estimates.a, estimates.b), num_roots)


def groups(order: IntArray, budget: int, *, group: int, cap: int) -> IntArray:
    """Groups for the prompts in `order`, best first, until `budget` is spent or all have `cap`."""
    group = min(group, cap)
    ranked = fill_in_order(np.full(len(order), group), budget)
    # A lone rollout teaches nothing: it goes on top of a full group instead.
    if (lone := np.flatnonzero(ranked == 1)).size and group > 1 and cap > group and ranked[0] == group:
        ranked[lone] = 0
    ranked = ranked + fill_in_order(cap - ranked, budget - int(ranked.sum()))
    counts = np.zeros(len(order), dtype=np.int64)
    counts[order] = ranked
    return counts
