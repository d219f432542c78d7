"""What a Stage 2 rule is."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from trace_async.method.anchors import Anchor
from trace_async.method.knapsack import IntArray
from trace_async.method.settings import BudgetSettings


class Stage2Rule(ABC):
    """Spends the continuations of one prompt on its anchors. Subclass it for a rule of your own:

        class Deepest(Stage2Rule):
            needs_values = False

            def plan(self, anchors, budget, rng):
                counts = np.zeros(len(anchors), dtype=np.int64)
                counts[-1:] = budget
                return counts

    and name it as `budget.stage2=my_package.my_module:Deepest`.
    """

    spends: ClassVar[bool] = True
    """Whether it ever buys anything. If not, environments need not be forked."""
    needs_values: ClassVar[bool] = True
    """Whether `plan` looks at V of the anchors. If not, the predictor is not asked."""
    uses: ClassVar[frozenset[str]] = frozenset({"max_per_prefix", "stage2_rounds"})
    """Which of the optional settings `max_per_prefix` and `stage2_rounds` it obeys; setting another one is refused."""

    def __init__(self, settings: BudgetSettings) -> None:
        self.settings = settings

    @abstractmethod
    def plan(self, anchors: Sequence[Anchor], budget: int, rng: np.random.Generator) -> IntArray:
        """Continuations of each anchor, integers [anchors]. `anchors` is not empty; `budget` is the published K_i."""
