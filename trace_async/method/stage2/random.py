"""Tree-GRPO (arXiv 2509.21240), and TreePO as in TRACE's tables: non-terminal turns drawn at random."""

from collections.abc import Sequence

import numpy as np

from trace_async.method.anchors import Anchor
from trace_async.method.knapsack import IntArray
from trace_async.method.stage2.rule import Stage2Rule


class Random(Stage2Rule):
    """Anchors are drawn with replacement, each up to `budget.max_per_prefix` times."""

    needs_values = False

    def plan(self, anchors: Sequence[Anchor], budget: int, rng: np.random.Generator) -> IntArray:
        count, cap = len(anchors), self.settings.max_per_prefix
        if cap is None:
            return rng.multinomial(budget, np.full(count, 1 / count))
        slots = rng.permutation(np.repeat(np.arange(count), min(cap, budget)))[:budget]
        return np.bincount(slots, minlength=count)
