"""What a Stage 1 rule is."""

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np

from trace_async.method.knapsack import IntArray
from trace_async.method.posterior import Estimates
from trace_async.method.settings import BudgetSettings
from trace_async.trees.tree import RolloutTree


class Stage1Rule(ABC):
    """Shares root rollouts among candidate prompts. Subclass it for a rule of your own:

        class HardestFirst(Stage1Rule):
            def plan(self, estimates, num_roots, rng):
                counts = np.zeros(len(estimates.mean), dtype=np.int64)
                counts[np.argsort(estimates.mean)[: num_roots // 2]] = 2
                return counts

    and name it as `budget.stage1=my_package.my_module:HardestFirst`.
    """

    needs_estimates: ClassVar[bool] = True
    """Whether `plan` looks at what is believed of the prompts. If not, the predictor is not asked."""
    at_price: ClassVar[bool] = False
    """Whether it buys at the market's price (`Estimates.price`) and not a number of roots. A Stage 2 that does so, too,
    then shares its budget."""
    uses: ClassVar[frozenset[str]] = frozenset()
    """Which of the optional settings `min_rollouts` and `explore_share` it obeys; setting another one is refused."""

    def __init__(self, settings: BudgetSettings) -> None:
        self.settings = settings

    @abstractmethod
    def plan(self, estimates: Estimates, num_roots: int, rng: np.random.Generator) -> IntArray:
        """Root rollouts of each candidate, integers [prompts]: `num_roots` in all where the caps allow it.

        A prompt with 0 is skipped for this round. `estimates`: of the candidates, in the same order.
        """

    def trains_on(self, tree: RolloutTree) -> bool:
        """Whether a finished tree enters the learner's batch. What is left out was generated and is charged."""
        return True
