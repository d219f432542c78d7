"""Ours, the default to beat (METHOD 3)."""

from collections.abc import Sequence

from trace_async.method.credit.groups import leave_one_out
from trace_async.method.credit.rule import CreditRule, Term
from trace_async.trees.tree import ROOT, RolloutTree


class Trace(CreditRule):
    """A root term for each time that roots were bought, and a leave-one-out branch term for fresh suffixes.

    Root term: A_j = r_j − mean of the other root rollouts, on all turns of root rollout j, weight 1/m. Of further roots
    that Stage 2 bought: as much, against all that was known when their round ended, weight 1/(number of them and all
    before them); the first ones' term stays as it was. Branch term of continuation c, one of the K that one round of
    Stage 2 bought at node h: A_c = r_c − mean of the other outcomes known at h (the rollout that passed there, the
    continuations of earlier rounds, the others of this round), only on the turns that c itself wrote, weight 1/(m·K).
    `normalize_std`: each group of outcomes is divided by its standard deviation + 1e-6. A root rollout without others
    has advantage 0.

    Each group is an unbiased estimate of ∇V(h)/m, whatever made Stage 2 choose h: its weight and its baseline use only
    what was known when it was bought. Outcomes of later rounds must stay out: that another round came here says
    something about how this one ended (test_exact_gradients.py).
    """

    normalizes = True
    compares_with_passed = True
    """Whether the rollout that passed at the anchor is part of the baseline."""

    def terms(self, tree: RolloutTree) -> list[Term]:
        by_anchor = _bought(tree)
        terms: list[Term] = []
        known: list[float] = []
        for _, bought in sorted(by_anchor.pop(ROOT, {}).items()):
            rewards = [*known, *(tree.rollouts[index].reward for index in bought)]
            advantages = leave_one_out(rewards, normalize_std=self.normalize_std)[len(known) :]
            terms += [
                Term(tree.fresh_nodes(index), a, 1 / len(rewards)) for index, a in zip(bought, advantages, strict=True)
            ]
            known = rewards
        m = sum(rollout.from_stage1 for rollout in tree.rollouts)
        for anchor, rounds in by_anchor.items():
            known = [tree.rollouts[tree.nodes[anchor].rollout].reward]
            for _, bought in sorted(rounds.items()):
                fresh = [tree.rollouts[index].reward for index in bought]
                for index, a in zip(bought, self._advantages(known, fresh), strict=True):
                    terms.append(Term(tree.fresh_nodes(index), a, 1 / (m * len(bought))))
                known += fresh
        return terms

    def _advantages(self, known: Sequence[float], fresh: Sequence[float]) -> list[float]:
        """Of the continuations with rewards `fresh`; `known`: the rollout that passed, then those of earlier rounds."""
        enough = not self.compares_with_passed and len(known) + len(fresh) > 2
        before = known[1:] if enough else known
        return leave_one_out([*before, *fresh], normalize_std=self.normalize_std)[len(before) :]


class TraceFresh(Trace):
    """As `Trace`, but where an anchor has at least two continuations their baseline leaves out the one that passed.

    Stage 2 picked that rollout for its outcome, so as a baseline it is far off on purpose: the gradient stays unbiased
    either way, and which of the two varies less depends on K. A lone continuation has nothing else to compare with.
    """

    compares_with_passed = False


def _bought(tree: RolloutTree) -> dict[int, dict[int, list[int]]]:
    """Anchor → round → the rollouts that this round bought there."""
    found: dict[int, dict[int, list[int]]] = {}
    for index, rollout in enumerate(tree.rollouts):
        found.setdefault(rollout.anchor, {}).setdefault(rollout.round, []).append(index)
    return found
