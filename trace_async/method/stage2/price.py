"""One price for all prompts (METHOD 8, beyond the paper)."""

from collections.abc import Sequence

import numpy as np

from trace_async.method.allocation import allocate_prefixes
from trace_async.method.anchors import Anchor
from trace_async.method.knapsack import IntArray
from trace_async.method.market import MAX_PER_PREFIX, expected_tokens, marginal_contrast
from trace_async.method.stage2.rule import Stage2Rule


class Price(Stage2Rule):
    """A continuation is bought while its expected contrast per expected token is above λ, the market's price.

    λ moves with what was spent, so that over prompts the spending meets the budget in tokens; one prompt may spend
    nothing and another a lot, and none waits for any other. As long as there is no price, K_i as published.
    """

    def plan(self, anchors: Sequence[Anchor], budget: int, rng: np.random.Generator) -> IntArray:
        cap, offer = self.settings.max_per_prefix, self.offer
        if offer.price is None:
            values, rewards = [a.value for a in anchors], [a.reward for a in anchors]
            return allocate_prefixes(values, rewards, budget, max_per_prefix=cap)
        counts = np.zeros(len(anchors), dtype=np.int64)
        for index, anchor in enumerate(anchors):
            rates = marginal_contrast(anchor, cap or MAX_PER_PREFIX) / expected_tokens(anchor, offer.tokens_after)
            counts[index] = (rates > offer.price).sum()
        return counts
