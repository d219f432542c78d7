"""Credit: a finished tree → the advantage of each turn's generated tokens. One rule a file, named in `registry`.

In every rule but `trace` the weights of a prompt's trajectories sum to 1, so each prompt with a budget counts alike.
"""

from collections.abc import Sequence

from trace_async.method.credit.rule import CreditRule, NodeCredit, Term
from trace_async.method.registry import credit_rule
from trace_async.trees.tree import RolloutTree

__all__ = ["CreditRule", "NodeCredit", "Term", "compute_credit", "compute_credits"]


def compute_credit(name: str, tree: RolloutTree, *, normalize_std: bool = False) -> NodeCredit:
    """Credit of one tree on its own; for rules that look at the whole batch see `compute_credits`."""
    return compute_credits(name, [tree], normalize_std=normalize_std)[0]


def compute_credits(name: str, trees: Sequence[RolloutTree], *, normalize_std: bool = False) -> list[NodeCredit]:
    """Credit of every tree of a batch by the rule `name` (`loss.advantage`)."""
    return credit_rule(name, normalize_std=normalize_std).credits(trees)
