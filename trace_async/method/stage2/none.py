"""Stage 1 alone."""

from collections.abc import Sequence

import numpy as np

from trace_async.method.anchors import Anchor
from trace_async.method.knapsack import IntArray
from trace_async.method.stage2.rule import Stage2Rule


class NoContinuations(Stage2Rule):
    """Nothing is continued."""

    forks = False
    needs_values = False
    uses = frozenset()

    def plan(self, anchors: Sequence[Anchor], budget: int, rng: np.random.Generator) -> IntArray:
        return np.zeros(len(anchors), dtype=np.int64)
