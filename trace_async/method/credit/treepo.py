"""TreePO (arXiv 2508.17445, its code)."""

from collections.abc import Sequence

import numpy as np

from trace_async.method.credit.groups import mean_of
from trace_async.method.credit.rule import CreditRule, Term
from trace_async.trees.tree import RolloutTree


class TreePo(CreditRule):
    """Per leaf, R − mean of the leaves below it, for every ancestor with more than one leaf, averaged over those
    ancestors; on the whole path, weight 1/leaves. Then whitened over the batch.

    Unlike that code, a leaf that shares no ancestor gets 0, since nothing is known to compare it with (there: R − 0),
    and the whitening divides by the standard deviation with n tokens (there: n − 1).
    """

    def terms(self, tree: RolloutTree) -> list[Term]:
        below: list[list[float]] = [[] for _ in tree.nodes]
        for leaf, reward in tree.leaf_rewards.items():
            for node in tree.path(leaf):
                below[node].append(reward)
        means = [mean_of(np.array(rewards)) if len(rewards) > 1 else None for rewards in below]
        terms = []
        for index, path in tree.branches():
            gains = [tree.rollouts[index].reward - mean for node in path if (mean := means[node]) is not None]
            terms.append(Term(path, mean_of(np.array(gains)) if gains else 0.0, 1 / len(tree.rollouts)))
        return terms

    def over_batch(self, trees: Sequence[RolloutTree], terms: Sequence[Sequence[Term]]) -> Sequence[Sequence[Term]]:
        """Advantages minus their mean, over their standard deviation, both by generated token over the whole batch."""
        pairs = [(tree, term) for tree, some in zip(trees, terms, strict=True) for term in some]
        advantages = np.array([term.advantage for _, term in pairs])
        tokens = np.array([sum(tree.nodes[node].num_generated for node in term.nodes) for tree, term in pairs])
        if not tokens.any():
            return terms  # nothing was generated, so there is nothing to give credit to
        mean = float(np.average(advantages, weights=tokens))
        std = float(np.sqrt(np.average((advantages - mean) ** 2, weights=tokens) + 1e-8))
        return [[Term(term.nodes, (term.advantage - mean) / std, term.weight) for term in some] for some in terms]
