"""TRACE's Stage 1: root rollouts where a success and a failure are most likely to be seen together."""

import numpy as np

from trace_async.method.allocation import allocate_roots, allocate_roots_at_price
from trace_async.method.knapsack import FloatArray, IntArray
from trace_async.method.posterior import Estimates
from trace_async.method.stage1.rule import Stage1Rule

# What budget.explore_share=null stands for; it measured best against forgetting (docs/RESULTS.md).
EXPLORE_SHARE = 0.125


class Point(Stage1Rule):
    """The paper's: Σ V_root(v_i, m_i) is greatest, v_i taken as known (METHOD 2)."""

    uses = frozenset({"min_rollouts", "explore_share"})

    def strength(self, estimates: Estimates) -> FloatArray | None:
        """Pseudo rollouts behind each mean, for `allocate_roots`; None: the means are taken as known."""
        return None

    def plan(self, estimates: Estimates, num_roots: int, rng: np.random.Generator) -> IntArray:
        """The knapsack, after `explore_share` of the budget went to pairs on random candidates (beyond the paper).

        Without them a belief that a prompt is easy is never put to the test again, so nobody sees the policy forget
        it. Explored prompts keep out of the knapsack; only what the others have no room for goes on top of the pairs.
        """
        least = self.settings.min_rollouts
        size, pair = estimates.size, max(2, least)
        # What the other prompts need for their minimum is not there to explore with.
        share = EXPLORE_SHARE if self.settings.explore_share is None else self.settings.explore_share
        pairs = min(size, int(share * num_roots) // 2)
        while pairs and pairs * pair + (size - pairs) * least > num_roots:
            pairs -= 1
        explored = rng.choice(size, size=pairs, replace=False)
        rest = np.setdiff1d(np.arange(size), explored)
        counts = np.zeros(size, dtype=np.int64)
        counts[rest] = self._best(estimates, rest, num_roots - pairs * pair, least)
        counts[explored] = self._best(estimates, explored, num_roots - int(counts.sum()), pair)
        return counts

    def _best(self, estimates: Estimates, prompts: IntArray, budget: int, least: int) -> IntArray:
        strength = self.strength(estimates)
        return allocate_roots(
            estimates.mean[prompts],
            budget,
            min_rollouts=least,
            max_rollouts=self.settings.max_rollouts,
            strength=None if strength is None else strength[prompts],
        )


class Beta(Point):
    """Ours: E[Σ V_root] under each prompt's Beta posterior, which can say "I do not know" (METHOD 2)."""

    def strength(self, estimates: Estimates) -> FloatArray | None:
        return estimates.strength


class Price(Beta):
    """As `Beta`, at one price for both stages: a root is bought while its contrast per expected token is above λ.

    λ is the market's. It keeps what a pool of candidates costs, in tokens and with its Stage 2, at what M root rollouts
    and their continuations cost on average; a rich pool gets more of it than a poor one. Until there is a price, M
    roots.
    """

    at_price = True
    uses = frozenset({"explore_share"})

    def _best(self, estimates: Estimates, prompts: IntArray, budget: int, least: int) -> IntArray:
        if estimates.price is None or estimates.tokens is None:
            return super()._best(estimates, prompts, budget, least)
        found = allocate_roots_at_price(
            estimates.mean[prompts],
            estimates.price,
            estimates.tokens[prompts],
            max_rollouts=self.settings.max_rollouts,
            strength=estimates.strength[prompts],
        )
        return np.maximum(found, least)
