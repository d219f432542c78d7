"""What values are learnt from: the rewards of finished rollouts, backed up over their tree."""

import math
from collections.abc import Sequence

import numpy as np

from trace_async.method.knapsack import FloatArray
from trace_async.trees.tree import RolloutTree


def backed_up_targets(tree: RolloutTree) -> tuple[FloatArray, FloatArray]:
    """Targets V^ and weights n_y, both [nodes]: V^(leaf) = r, V^(y) = Σ_c n_c·V^(c) / n_y (TRACE, METHOD section 2).

    That is the mean reward of the leaves below y; n_y counts them. A node without leaves (all its rollouts broke down)
    has weight 0.
    """
    weights = np.array(tree.num_leaves, dtype=float)
    totals = np.zeros(len(tree.nodes))
    for leaf, reward in tree.leaf_rewards.items():
        totals[leaf] = reward
    for index in range(len(tree.nodes) - 1, 0, -1):
        totals[tree.nodes[index].parent] += totals[index]
    return totals / np.maximum(weights, 1), weights


def learnable(trees: Sequence[RolloutTree]) -> list[RolloutTree]:
    """The trees that can be learnt from: with rollouts, all of whose rewards lie between 0 and 1.

    One reward that is not a number would make every value not a number, at once and for good.
    """
    return [
        tree
        for tree in trees
        if tree.rollouts and all(math.isfinite(r.reward) and 0 <= r.reward <= 1 for r in tree.rollouts)
    ]
