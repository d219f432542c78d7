"""One price for all prompts (METHOD 8, beyond the paper)."""

from collections.abc import Sequence

import numpy as np

from trace_async.method.allocation import allocate_prefixes
from trace_async.method.anchors import Anchor
from trace_async.method.knapsack import IntArray
from trace_async.method.market import MAX_PER_PREFIX, expected_tokens, marginal_contrast
from trace_async.method.stage2.rule import Stage2Rule


class Price(Stage2Rule):
    """A rollout is bought while its expected contrast per expected token is above λ, the market's price.

    It may be a continuation, or a further root where all roots of the prompt agree. λ moves with what was spent, so
    that over prompts the spending meets the budget in tokens; one prompt may spend nothing and another a lot, and none
    waits for any other. As long as there is no price, K_i continuations as published.
    """

    buys_roots = True
    at_price = True

    def plan(self, anchors: Sequence[Anchor], budget: int, rng: np.random.Generator) -> IntArray:
        if self.offer.price is None:
            return self._without_price(anchors, budget)
        most = self.settings.max_per_prefix or MAX_PER_PREFIX
        contrast = np.array([marginal_contrast(anchor, most) for anchor in anchors])
        own, depths = np.array([(a.expected_tokens, a.depth) for a in anchors]).T
        cost = expected_tokens(own, depths.astype(np.int64), self.offer.dearer)
        return np.asarray((contrast / cost[:, None] > self.offer.price).sum(axis=1), dtype=np.int64)

    def _without_price(self, anchors: Sequence[Anchor], budget: int) -> IntArray:
        counts = np.zeros(len(anchors), dtype=np.int64)
        turns = [index for index, anchor in enumerate(anchors) if anchor.depth]
        values, rewards = [anchors[index].value for index in turns], [anchors[index].reward for index in turns]
        counts[turns] = allocate_prefixes(values, rewards, budget, max_per_prefix=self.settings.max_per_prefix)
        return counts


class TopUp(Price):
    """Sequential top-up: what others spend on continuations goes to further roots of prompts that are still open.

    Stage 1's roots are a first look. Where they agree, the posterior of the prompt says how likely a further one is to
    end otherwise, and it is bought while that is worth the price. As long as there is no price, a root for every two
    continuations that the prompt could have had, as a continuation counts as half a trajectory.
    """

    forks = False
    needs_values = False

    def _without_price(self, anchors: Sequence[Anchor], budget: int) -> IntArray:
        return np.array([min(budget // 2, self.settings.max_per_prefix or budget)] * len(anchors), dtype=np.int64)
