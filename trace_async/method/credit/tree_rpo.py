"""TreeRPO (arXiv 2506.05183)."""

import numpy as np

from trace_async.method.credit.groups import mean_of, standardised
from trace_async.method.credit.rule import CreditRule, Term
from trace_async.trees.tree import ROOT, RolloutTree


class TreeRpo(CreditRule):
    """A node's value is the mean of its children's; a child's advantage is its value standardised among its siblings.

    The standard deviation has n − 1. A step of that paper is a whole edge between two branchings. Here an only child
    is part of the edge it lies on and shares its parent's advantage. Weight: the node's share of the prompt's leaves.
    """

    def terms(self, tree: RolloutTree) -> list[Term]:
        values = np.zeros(len(tree.nodes))
        for index in range(len(tree.nodes) - 1, -1, -1):
            children = tree.children[index]
            values[index] = mean_of(values[list(children)]) if children else tree.leaf_rewards.get(index, 0.0)
        advantages = np.zeros(len(tree.nodes))
        for parent, children in enumerate(tree.children):
            siblings = list(children)
            if len(siblings) == 1:
                advantages[siblings] = advantages[parent]
            elif siblings:
                advantages[siblings] = standardised(values[siblings])
        shares = np.array(tree.num_leaves) / max(1, tree.num_leaves[ROOT])
        return [Term((node,), float(advantages[node]), float(shares[node])) for node in range(1, len(tree.nodes))]
