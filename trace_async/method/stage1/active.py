"""TRACE's Stage 1: root rollouts where a success and a failure are most likely to be seen together."""

import numpy as np

from trace_async.method.allocation import allocate_roots, allocate_roots_by_tokens
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


class BetaPerToken(Stage1Rule):
    """As `Beta`, for the tokens that M average root rollouts write: short prompts get more of them, long ones fewer.

    Until lengths were seen, M roots. No `min_rollouts` and no exploring: a price in tokens leaves out what is dear.
    """

    def plan(self, estimates: Estimates, num_roots: int, rng: np.random.Generator) -> IntArray:
        cap = self.settings.max_rollouts
        if estimates.tokens is None:
            return allocate_roots(estimates.mean, num_roots, max_rollouts=cap, strength=estimates.strength)
        return allocate_roots_by_tokens(
            estimates.mean,
            num_roots * float(estimates.tokens.mean()),
            estimates.tokens,
            max_rollouts=cap,
            strength=estimates.strength,
        )


class Beta(Point):
    """Ours: E[Σ V_root] under each prompt's Beta posterior, which can say "I do not know" (METHOD 2)."""

    def strength(self, estimates: Estimates) -> FloatArray | None:
        return estimates.strength
