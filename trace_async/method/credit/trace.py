"""Ours, the default to beat (METHOD 3)."""

from trace_async.method.credit.groups import leave_one_out
from trace_async.method.credit.rule import CreditRule, Term
from trace_async.trees.tree import RolloutTree


class Trace(CreditRule):
    """A root term fixed before Stage 2, and a leave-one-out branch term for fresh suffixes.

    Root term: A_j = r_j − mean of the other root rollouts, on all turns of root rollout j, weight 1/m. Branch term of
    continuation c, one of K_h at node h: A_c = r_c − mean of the other outcomes at h (the rollout that passed there and
    the other continuations), only on the turns that c itself wrote, weight 1/(m·K_h). `normalize_std`: each group of
    outcomes is divided by its standard deviation + 1e-6. A root rollout without others has advantage 0.
    """

    normalizes = True

    def terms(self, tree: RolloutTree) -> list[Term]:
        roots = [index for index, rollout in enumerate(tree.rollouts) if rollout.kind == "root"]
        rewards = [tree.rollouts[index].reward for index in roots]
        advantages = leave_one_out(rewards, normalize_std=self.normalize_std)
        m = len(roots)
        terms = [Term(tree.fresh_nodes(index), a, 1 / m) for index, a in zip(roots, advantages, strict=True)]
        at_anchor: dict[int, list[int]] = {}
        for index, rollout in enumerate(tree.rollouts):
            if rollout.kind == "continuation":
                at_anchor.setdefault(rollout.anchor, []).append(index)
        for anchor, continuations in at_anchor.items():
            passed = tree.rollouts[tree.nodes[anchor].rollout].reward
            outcomes = [passed, *(tree.rollouts[index].reward for index in continuations)]
            found = leave_one_out(outcomes, normalize_std=self.normalize_std)[1:]
            for index, a in zip(continuations, found, strict=True):
                terms.append(Term(tree.fresh_nodes(index), a, 1 / (m * len(continuations))))
        return terms
