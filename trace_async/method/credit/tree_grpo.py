"""Tree-GRPO (arXiv 2509.21240, its code)."""

import numpy as np

from trace_async.method.credit.groups import standardised
from trace_async.method.credit.rule import CreditRule, Term
from trace_async.trees.tree import RolloutTree


class TreeGrpo(CreditRule):
    """One scalar per leaf on its whole root-to-leaf path, weight 1/leaves.

    A = (R − mean_tree)/(std_tree + 1e-6) + (R − mean_prompt)/(std_prompt + 1e-6), std with n − 1; a lone leaf has mean
    0 and std 1. A tree is a root rollout and all that was continued from it; the prompt holds all trees.
    """

    def terms(self, tree: RolloutTree) -> list[Term]:
        paths = [path for _, path in tree.branches()]
        rewards = np.array([rollout.reward for rollout in tree.rollouts])
        first_turns = np.array([path[1] for path in paths])
        advantages = standardised(rewards)
        for first in set(first_turns.tolist()):
            inside = first_turns == first
            advantages[inside] += standardised(rewards[inside])
        return [Term(path, float(a), 1 / len(paths)) for path, a in zip(paths, advantages, strict=True)]
