"""Rules of one's own for both stages: a band of success rates, and the last turns of failures."""

from collections.abc import Sequence

import numpy as np

from trace_async.method.anchors import Anchor
from trace_async.method.knapsack import IntArray
from trace_async.method.posterior import Estimates
from trace_async.method.stage1.rule import Stage1Rule
from trace_async.method.stage2.rule import Stage2Rule


class Band(Stage1Rule):
    """Four rollouts for each prompt whose expected success lies between .2 and .8, the surest of them first.

    When too few do, the nearest to the band come next: the budget is spent whenever the pool is large enough.
    """

    def plan(self, estimates: Estimates, num_roots: int, rng: np.random.Generator) -> IntArray:
        outside = np.maximum(0.2 - estimates.mean, estimates.mean - 0.8).clip(min=0.0)
        order = np.lexsort((-estimates.strength, outside))  # by distance to the band, then by what is known best
        counts = np.zeros(estimates.size, dtype=np.int64)
        counts[order[: num_roots // 4]] = min(4, self.settings.max_rollouts)
        return counts


class LastTurnsOfFailures(Stage2Rule):
    """Continues the latest turns of failed rollouts, one continuation each, latest first."""

    needs_values = False  # so the predictor is not asked about prefixes
    uses = frozenset({"stage2_rounds"})

    def plan(self, anchors: Sequence[Anchor], budget: int, rng: np.random.Generator) -> IntArray:
        failed = [index for index, anchor in enumerate(anchors) if anchor.reward == 0]
        failed.sort(key=lambda index: anchors[index].depth, reverse=True)
        counts = np.zeros(len(anchors), dtype=np.int64)
        counts[failed[:budget]] = 1
        return counts
