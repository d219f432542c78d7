"""VIP (arXiv 2602.01601): spread the batch's budget so that the gradient's variance is least."""

import numpy as np

from trace_async.method.knapsack import FloatArray, IntArray, fill_in_order, spend
from trace_async.method.posterior import Estimates
from trace_async.method.stage1.rule import Stage1Rule


class Vip(Stage1Rule):
    """The leave-one-out estimator of prompt i has variance a_i/(n_i − 1), a_i = v_i(1−v_i).

    Under Σ n_i = M the optimum is n* = 1 + sqrt(a/λ). Here exactly in integers: one more rollout saves a/((n−1)n),
    falling in n. VIP chooses counts, not prompts: the batch is the first M/n prompts of the pool (n =
    `budget.uniform_rollouts`), each with at least 2.
    """

    def plan(self, estimates: Estimates, num_roots: int, rng: np.random.Generator) -> IntArray:
        cap = self.settings.max_rollouts
        batch = min(estimates.size, max(1, num_roots // self.settings.uniform_rollouts))
        a = (estimates.mean * (1 - estimates.mean))[:batch]
        least = min(2, cap, num_roots // batch)

        def savings(items: IntArray, width: int) -> FloatArray:
            n = np.arange(2, width + 2)
            return np.asarray(a[items, None] / ((n - 1) * n), dtype=float)

        counts = np.zeros(estimates.size, dtype=np.int64)
        counts[:batch] = least + spend(savings, batch, num_roots - least * batch, cap - least)
        return counts + fill_in_order(cap - counts, num_roots - int(counts.sum()))
