"""What a credit rule is: finished trees → three numbers for each turn's generated tokens."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from trace_async.method.knapsack import FloatArray
from trace_async.trees.tree import RolloutTree

EPSILON = 1e-6  # added to a standard deviation, as in Tree-GRPO's and verl's code


@dataclass(frozen=True, slots=True)
class Term:
    """One advantage on the generated tokens of `nodes`, with its weight."""

    nodes: tuple[int, ...]
    advantage: float
    weight: float


@dataclass(frozen=True, slots=True)
class NodeCredit:
    """Per node of a tree, float arrays [nodes]: `positive` ≥ 0, `negative` ≤ 0, `weight` ≥ 0.

    A turn may be trained by several terms k, each with an advantage A_k and a weight w_k (a prefix shared by many
    leaves). The clipped objective is linear in A for each sign of A, so the terms collapse exactly into Σ w_k·max(A_k,
    0), Σ w_k·min(A_k, 0) and Σ w_k. The token is computed once, its gradient is that of all terms.
    """

    positive: FloatArray
    negative: FloatArray
    weight: FloatArray


class CreditRule(ABC):
    """Gives credit to a finished tree. Subclass it for a rule of your own:

        class RewardOnly(CreditRule):
            def terms(self, tree):
                return [Term(path, tree.rollouts[r].reward, 1 / len(tree.rollouts)) for r, path in tree.branches()]

    and name it as `loss.advantage=my_package.my_module:RewardOnly`.
    """

    normalizes: ClassVar[bool] = False
    """Whether it obeys `loss.normalize_std`: the others have a division by a standard deviation built in, or none."""

    def __init__(self, *, normalize_std: bool = False) -> None:
        self.normalize_std = normalize_std

    @abstractmethod
    def terms(self, tree: RolloutTree) -> list[Term]:
        """The advantages of one tree, on its own."""

    def over_batch(self, trees: Sequence[RolloutTree], terms: Sequence[Sequence[Term]]) -> Sequence[Sequence[Term]]:
        """What only the whole batch can say, after `terms` of every tree; most rules have nothing to add."""
        return terms

    def credits(self, trees: Sequence[RolloutTree]) -> list[NodeCredit]:
        """Credit of every tree of a batch."""
        terms = self.over_batch(trees, [self.terms(tree) for tree in trees])
        return [_collapse(tree, some) for tree, some in zip(trees, terms, strict=True)]


def _collapse(tree: RolloutTree, terms: Sequence[Term]) -> NodeCredit:
    positive, negative, weight = np.zeros((3, len(tree.nodes)))
    for term in terms:
        nodes = [node for node in term.nodes if tree.nodes[node].num_generated]
        positive[nodes] += term.weight * max(term.advantage, 0.0)
        negative[nodes] += term.weight * min(term.advantage, 0.0)
        weight[nodes] += term.weight
    return NodeCredit(positive=positive, negative=negative, weight=weight)
