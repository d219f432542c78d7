"""By what the loss of a batch is divided: `loss.aggregation`, one small class each.

Let l_t be the loss of token t (linear in its credit) and w_t its weight, over all generated tokens of all trees.
`Constant` divides by numbers that no outcome changes, so the gradient is unbiased if the advantage is
(test_exact_gradients.py). The others are weighted means. It does not matter to them how an advantage scales its
weights. But they divide by something that depends on the outcomes, which biases them towards short successes and long
failures.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from trace_async.method.credit import NodeCredit
from trace_async.method.knapsack import FloatArray
from trace_async.trees.tree import RolloutTree


class Aggregation(ABC):
    """Scales credits so that the plain sum over all tokens' losses is the batch's loss.

    Subclass it for one of your own and name it as `loss.aggregation=my_package.my_module:MyAggregation`. Tokens without
    advantage stay in the divisors, whether or not they are computed.
    """

    def __init__(self, *, divisor_tokens: float = 64.0) -> None:
        """`divisor_tokens`: the setting of this name."""
        self.divisor_tokens = divisor_tokens

    def shares(self, tree: RolloutTree) -> FloatArray:
        """Return by how much each node's tokens count in the tree, before anything is divided [nodes]."""
        return np.ones(len(tree.nodes))

    @abstractmethod
    def divisors(self, totals: FloatArray) -> FloatArray:
        """Return what each tree is divided by [trees]; infinity leaves it out.

        `totals` [trees]: Σ weight · share over the generated tokens of each tree.
        """

    def normalize(self, trees: Sequence[RolloutTree], credits: Sequence[NodeCredit]) -> list[NodeCredit]:
        """Return the credits, scaled."""
        shares = [self.shares(tree) for tree in trees]
        generated = [np.array([node.num_generated for node in tree.nodes], dtype=np.float64) for tree in trees]
        totals = [
            (credit.weight * tokens * share).sum()
            for credit, tokens, share in zip(credits, generated, shares, strict=True)
        ]
        scales = [share / divisor for share, divisor in zip(shares, self.divisors(np.array(totals)), strict=True)]
        return [
            NodeCredit(positive=credit.positive * scale, negative=credit.negative * scale, weight=credit.weight * scale)
            for credit, scale in zip(credits, scales, strict=True)
        ]


class Constant(Aggregation):
    """(1/P) Σ_t l_t / C over the P trees that carry weight, with C = `divisor_tokens`.

    The idea is that of Dr. GRPO (arXiv 2503.20783).
    """

    def divisors(self, totals: FloatArray) -> FloatArray:
        return np.full(len(totals), self.divisor_tokens * max(1, (totals > 0).sum()))


class Token(Aggregation):
    """Σ l_t / Σ w_t, which is DAPO's (arXiv 2503.14476, eq. 8) when every weight is 1.

    Its bias falls as 1 / number of prompts in the batch.
    """

    def divisors(self, totals: FloatArray) -> FloatArray:
        return np.full(len(totals), totals.sum() or np.inf)


class PerSequence(Token):
    """Σ_r (1/n_r) Σ_{t∈r} l_t / Σ_r (1/n_r) Σ_{t∈r} w_t over the rollouts r, each with the n_r tokens it wrote itself.

    That is GRPO's (arXiv 2402.03300, eq. 3) when nothing is shared and every weight is 1.
    """

    def shares(self, tree: RolloutTree) -> FloatArray:
        tokens = np.array([node.num_generated for node in tree.nodes], dtype=np.float64)
        owner = np.array([node.rollout for node in tree.nodes])
        written = np.zeros(len(tree.rollouts))
        np.add.at(written, owner[1:], tokens[1:])  # unlike `+=`, it adds for every repeated index
        shares = np.ones(len(tree.nodes))
        shares[1:] = 1 / np.maximum(written[owner[1:]], 1)
        return shares


class Prompt(Aggregation):
    """(1/P) Σ_i Σ_{t∈i} l_t / Σ_{t∈i} w_t over the P trees i that carry weight.

    Every prompt counts alike, however many rollouts it was given. A tree's own outcomes decide its divisor, so when
    lengths depend on outcomes the sign of the gradient can flip, and more prompts do not help.
    """

    def divisors(self, totals: FloatArray) -> FloatArray:
        return np.where(totals > 0, totals * (totals > 0).sum(), np.inf)


def normalize_credits(
    trees: Sequence[RolloutTree], credits: Sequence[NodeCredit], aggregation: str, *, divisor_tokens: float = 64.0
) -> list[NodeCredit]:
    """Return the credits, scaled by the aggregation of this name."""
    from trace_async.method.registry import aggregation_rule

    return aggregation_rule(aggregation, divisor_tokens=divisor_tokens).normalize(trees, credits)
