"""Advantages: a finished tree → the credit of each turn's generated tokens. Pure functions, chosen by name.

A turn may be trained by several terms k, each with an advantage A_k and a weight w_k (a prefix shared by many
leaves). The clipped objective is linear in A for each sign of A, so the terms collapse exactly into three numbers per
node: Σ w_k·max(A_k, 0), Σ w_k·min(A_k, 0) and Σ w_k. The token is computed once, its gradient is that of all terms.

In every rule but `trace` the weights of a prompt's trajectories sum to 1, so each prompt with a budget counts alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from trace_async.config import AdvantageName
from trace_async.method.marginals import FloatArray
from trace_async.trees.tree import ROOT, RolloutTree

_EPSILON = 1e-6  # added to a standard deviation, as in Tree-GRPO's and verl's code


@dataclass(frozen=True, slots=True)
class Term:
    """One advantage on the generated tokens of `nodes`, with its weight."""

    nodes: tuple[int, ...]
    advantage: float
    weight: float


@dataclass(frozen=True, slots=True)
class NodeCredit:
    """Per node of a tree, float arrays [nodes]: `positive` ≥ 0, `negative` ≤ 0, `weight` ≥ 0 (see the module)."""

    positive: FloatArray
    negative: FloatArray
    weight: FloatArray


def compute_credit(name: AdvantageName, tree: RolloutTree, *, normalize_std: bool = False) -> NodeCredit:
    """Credit of one tree on its own; for `treepo`, whose whitening spans the batch, see `compute_credits`."""
    return compute_credits(name, [tree], normalize_std=normalize_std)[0]


def compute_credits(
    name: AdvantageName, trees: Sequence[RolloutTree], *, normalize_std: bool = False
) -> list[NodeCredit]:
    """Credit of every tree of a batch. `normalize_std` divides by the group's standard deviation where that is a
    choice (`grpo`, `trace`); the other rules have it built in or never have it."""
    terms = [_TERMS[name](tree, normalize_std) for tree in trees]
    if name == "treepo":
        terms = _whitened(trees, terms)
    return [_collapse(tree, tree_terms) for tree, tree_terms in zip(trees, terms, strict=True)]


def _collapse(tree: RolloutTree, terms: Sequence[Term]) -> NodeCredit:
    positive, negative, weight = np.zeros((3, len(tree.nodes)))
    for term in terms:
        nodes = [node for node in term.nodes if tree.nodes[node].num_generated]
        positive[nodes] += term.weight * max(term.advantage, 0.0)
        negative[nodes] += term.weight * min(term.advantage, 0.0)
        weight[nodes] += term.weight
    return NodeCredit(positive=positive, negative=negative, weight=weight)


def _grpo(tree: RolloutTree, normalize_std: bool) -> list[Term]:
    """DeepSeekMath (arXiv 2402.03300): root rollouts only, A = r − mean(r), optional / (std + 1e-6), std with n − 1."""
    roots = [rollout for rollout in tree.rollouts if rollout.kind == "root"]
    rewards = np.array([rollout.reward for rollout in roots])
    scale = _std(rewards) + _EPSILON if normalize_std else 1.0
    return [
        Term(tree.path(rollout.leaf), float(rollout.reward - rewards.mean()) / scale, 1 / len(roots))
        for rollout in roots
    ]


def _trace(tree: RolloutTree, normalize_std: bool) -> list[Term]:
    """Ours (METHOD section 3): a root term fixed before Stage 2, and a leave-one-out branch term for fresh suffixes.

    Root term: A_j = r_j − mean of the other root rollouts, on all turns of root rollout j, weight 1/m. Branch term of
    continuation c, one of K_h at node h: A_c = r_c − mean of the other outcomes at h (the rollout that passed there and
    the other continuations), only on the turns that c itself wrote, weight 1/(m·K_h). `normalize_std`: each group of
    outcomes is divided by its standard deviation + 1e-6. A root rollout without others has advantage 0.
    """
    roots = [index for index, rollout in enumerate(tree.rollouts) if rollout.kind == "root"]
    rewards = [tree.rollouts[index].reward for index in roots]
    advantages = _leave_one_out(rewards, normalize_std)
    m = len(roots)
    terms = [Term(tree.fresh_nodes(index), a, 1 / m) for index, a in zip(roots, advantages, strict=True)]
    at_anchor: dict[int, list[int]] = {}
    for index, rollout in enumerate(tree.rollouts):
        if rollout.kind == "continuation":
            at_anchor.setdefault(rollout.anchor, []).append(index)
    for anchor, continuations in at_anchor.items():
        passed = tree.rollouts[tree.nodes[anchor].rollout].reward
        outcomes = [passed, *(tree.rollouts[index].reward for index in continuations)]
        for index, a in zip(continuations, _leave_one_out(outcomes, normalize_std)[1:], strict=True):
            terms.append(Term(tree.fresh_nodes(index), a, 1 / (m * len(continuations))))
    return terms


def _leave_one_out(rewards: Sequence[float], normalize_std: bool) -> list[float]:
    """Each reward minus the mean of the others (0 for one alone)."""
    if len(rewards) < 2:
        return [0.0] * len(rewards)
    total = sum(rewards)
    scale = _std(np.array(rewards)) + _EPSILON if normalize_std else 1.0
    return [(reward - (total - reward) / (len(rewards) - 1)) / scale for reward in rewards]


def _tree_grpo(tree: RolloutTree, normalize_std: bool) -> list[Term]:
    """Tree-GRPO (arXiv 2509.21240, its code): one scalar per leaf on its whole root-to-leaf path, weight 1/leaves.

    A = (R − mean_tree)/(std_tree + 1e-6) + (R − mean_prompt)/(std_prompt + 1e-6), std with n − 1; a lone leaf has mean
    0 and std 1. A tree is a root rollout and all that was continued from it; the prompt holds all trees.
    """
    paths = [path for _, path in tree.branches()]
    rewards = np.array([rollout.reward for rollout in tree.rollouts])
    first_turns = np.array([path[1] for path in paths])
    advantages = _standardised(rewards, rewards)
    for first in set(first_turns.tolist()):
        inside = first_turns == first
        advantages[inside] += _standardised(rewards[inside], rewards[inside])
    return [Term(path, float(a), 1 / len(paths)) for path, a in zip(paths, advantages, strict=True)]


def _standardised(values: FloatArray, group: FloatArray) -> FloatArray:
    if len(group) < 2:
        return values / (1.0 + _EPSILON)
    return np.asarray((values - group.mean()) / (_std(group) + _EPSILON))


def _treepo(tree: RolloutTree, normalize_std: bool) -> list[Term]:
    """TreePO (arXiv 2508.17445, its code): per leaf, R − mean of the leaves below it, for every ancestor with more
    than one leaf, averaged over those ancestors; on the whole path, weight 1/leaves. `_whitened` follows."""
    total = np.zeros(len(tree.nodes))
    for leaf, reward in tree.leaf_rewards.items():
        total[list(tree.path(leaf))] += reward
    terms = []
    for index, path in tree.branches():
        reward = tree.rollouts[index].reward
        gains = [reward - total[node] / tree.num_leaves[node] for node in path if tree.num_leaves[node] > 1]
        terms.append(Term(path, float(np.mean(gains)) if gains else 0.0, 1 / len(tree.rollouts)))
    return terms


def _whitened(trees: Sequence[RolloutTree], terms: Sequence[Sequence[Term]]) -> list[list[Term]]:
    """Advantages minus their mean, over their standard deviation, both by generated token over the whole batch."""
    advantages = np.array([term.advantage for some in terms for term in some])
    if not len(advantages):
        return [list(some) for some in terms]
    tokens = np.array(
        [
            sum(tree.nodes[node].num_generated for node in term.nodes)
            for tree, some in zip(trees, terms, strict=True)
            for term in some
        ]
    )
    mean = np.average(advantages, weights=tokens)
    std = np.sqrt(np.average((advantages - mean) ** 2, weights=tokens) + 1e-8)
    return [[Term(term.nodes, float((term.advantage - mean) / std), term.weight) for term in some] for some in terms]


def _tree_rpo(tree: RolloutTree, normalize_std: bool) -> list[Term]:
    """TreeRPO (arXiv 2506.05183): a node's value is the mean of its children's; a child's advantage is its value
    standardised among its siblings (std with n − 1).

    A step of that paper is a whole edge between two branchings. Here an only child is part of the edge it lies on and
    shares its parent's advantage. Weight: the node's share of the prompt's leaves.
    """
    values = np.zeros(len(tree.nodes))
    for index in range(len(tree.nodes) - 1, -1, -1):
        children = tree.children[index]
        values[index] = np.mean(values[list(children)]) if children else tree.leaf_rewards.get(index, 0.0)
    advantages = np.zeros(len(tree.nodes))
    for parent, children in enumerate(tree.children):
        siblings = list(children)
        if len(siblings) == 1:
            advantages[siblings] = advantages[parent]
        elif siblings:
            advantages[siblings] = _standardised(values[siblings], values[siblings])
    shares = np.array(tree.num_leaves) / max(1, tree.num_leaves[ROOT])
    return [Term((node,), float(advantages[node]), float(shares[node])) for node in range(1, len(tree.nodes))]


def _std(values: FloatArray) -> float:
    """Standard deviation with n − 1; 0 for one value."""
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


_TERMS: dict[AdvantageName, Callable[[RolloutTree, bool], list[Term]]] = {
    "grpo": _grpo,
    "trace": _trace,
    "tree_grpo": _tree_grpo,
    "treepo": _treepo,
    "tree_rpo": _tree_rpo,
}
