"""An advantage of one's own: every rollout against the mean of the others (RLOO, arXiv 2402.14740)."""

from trace_async.method.credit import CreditRule, Term
from trace_async.trees.tree import RolloutTree


class LeaveOneOut(CreditRule):
    """A_r = reward of r − mean reward of the other roots, on all turns of r, with weight 1/m.

    The baseline does not contain r's own reward, so the gradient is unbiased at any group size m ≥ 2.
    """

    def terms(self, tree: RolloutTree) -> list[Term]:
        roots = [rollout for rollout in tree.rollouts if rollout.from_stage1]
        if len(roots) < 2:
            return []
        total = sum(rollout.reward for rollout in roots)
        terms = []
        for rollout in roots:
            others = (total - rollout.reward) / (len(roots) - 1)
            terms.append(Term(tree.path(rollout.leaf), rollout.reward - others, 1 / len(roots)))
        return terms
