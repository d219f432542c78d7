"""GRPO (DeepSeekMath, arXiv 2402.03300)."""

import numpy as np

from trace_async.method.credit.groups import centred, std
from trace_async.method.credit.rule import EPSILON, CreditRule, Term
from trace_async.trees.tree import RolloutTree


class Grpo(CreditRule):
    """Root rollouts only: A = r − mean(r), with `normalize_std` over (std + 1e-6), std with n − 1."""

    normalizes = True

    def terms(self, tree: RolloutTree) -> list[Term]:
        roots = [rollout for rollout in tree.rollouts if rollout.kind == "root"]
        rewards = np.array([rollout.reward for rollout in roots])
        scale = std(rewards) + EPSILON if self.normalize_std else 1.0
        return [
            Term(tree.path(rollout.leaf), float(advantage) / scale, 1 / len(roots))
            for rollout, advantage in zip(roots, centred(rewards), strict=True)
        ]
