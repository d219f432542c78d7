"""TRACE's Stage 2: continuations where one is most likely to end unlike the rollout that passed there."""

from collections.abc import Sequence

import numpy as np

from trace_async.method.allocation import (
    allocate_prefixes,
    allocate_prefixes_by_tokens,
    allocate_prefixes_by_value,
    prefix_value,
)
from trace_async.method.anchors import Anchor
from trace_async.method.knapsack import IntArray
from trace_async.method.stage2.rule import Stage2Rule


class Contrast(Stage2Rule):
    """The paper's: Σ V_pref is greatest for so many continuations."""

    def plan(self, anchors: Sequence[Anchor], budget: int, rng: np.random.Generator) -> IntArray:
        values, rewards = [a.value for a in anchors], [a.reward for a in anchors]
        return allocate_prefixes(values, rewards, budget, max_per_prefix=self.settings.max_per_prefix)


class ContrastPerToken(Stage2Rule):
    """Beyond the paper: Σ V_pref is greatest for the tokens that `Contrast` would spend, since late prefixes are cheap.

    So at equal expected tokens it is never worse, and what it saves buys further continuations: their number is not
    that of the budget.
    """

    def plan(self, anchors: Sequence[Anchor], budget: int, rng: np.random.Generator) -> IntArray:
        values, rewards = [a.value for a in anchors], [a.reward for a in anchors]
        cap, cost = self.settings.max_per_prefix, np.array([a.expected_tokens for a in anchors])
        published = allocate_prefixes(values, rewards, budget, max_per_prefix=cap)
        tokens = float(published @ cost)
        found = allocate_prefixes_by_tokens(values, rewards, tokens, cost, max_per_prefix=cap)
        # Rounding may cost a little of a large budget.
        worth = [prefix_value(values, rewards, counts).sum() for counts in (found, published)]
        return found if worth[0] > worth[1] else published


class ContrastValueOnly(Stage2Rule):
    """As `Contrast`, blind to the outcomes, so that continuations and rollout may be pooled without bias (METHOD 3)."""

    def plan(self, anchors: Sequence[Anchor], budget: int, rng: np.random.Generator) -> IntArray:
        values = [anchor.value for anchor in anchors]
        return allocate_prefixes_by_value(values, budget, max_per_prefix=self.settings.max_per_prefix)
