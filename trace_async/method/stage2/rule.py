"""What a Stage 2 rule is."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from trace_async.method.anchors import Anchor
from trace_async.method.knapsack import IntArray
from trace_async.method.market import Offer
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

    forks: ClassVar[bool] = True
    """Whether it continues turns. If not, environments need not be forked."""
    buys_roots: ClassVar[bool] = False
    """Whether it buys further root rollouts: then the prompt is among the anchors (depth 0) while its roots agree."""
    at_price: ClassVar[bool] = False
    """Whether it buys at the market's price (`Offer.price`) and not a number of rollouts."""
    needs_values: ClassVar[bool] = True
    """Whether `plan` looks at V of the anchors. If not, the predictor is not asked."""
    uses: ClassVar[frozenset[str]] = frozenset({"max_per_prefix", "stage2_rounds"})
    """Which of the optional settings `max_per_prefix` and `stage2_rounds` it obeys; setting another one is refused."""

    def __init__(self, settings: BudgetSettings, offer: Offer | None = None) -> None:
        """`offer`: what the market says to this prompt."""
        self.settings = settings
        self.offer = offer or Offer()

    def spend(self, anchors: Sequence[Anchor], budget: int, rng: np.random.Generator) -> IntArray:
        """`plan` over the anchors at which continuations pay (`budget.continuations=auto`); the others get none."""
        counts = np.zeros(len(anchors), dtype=np.int64)
        open_ = [index for index, anchor in enumerate(anchors) if anchor.depth not in self.offer.closed_depths]
        if open_:
            counts[open_] = self.plan([anchors[index] for index in open_], budget, rng)
        return counts

    @abstractmethod
    def plan(self, anchors: Sequence[Anchor], budget: int, rng: np.random.Generator) -> IntArray:
        """Rollouts from each anchor, integers [anchors]. `anchors` is not empty; `budget` is the published K_i."""
