"""How much of an outcome a prefix has decided (ρ), how much of the cost lies before it (s), by depth: does a fork pay?

Two rollouts that go on from the same prefix share only the prefix, so the covariance of their outcomes, within a
prompt, is the variance of V(H) over its prefixes: ρ = Cov(r, r') / Var(r), without knowing V (docs/METHOD.md, section
8). A second leaf at the prefix beats a new root rollout only if s > 2ρ/(1+ρ).
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trace_async.trees.tree import ROOT, RolloutTree


@dataclass(frozen=True, slots=True, kw_only=True)
class Depth:
    """Prefixes of `depth` turns, or a few more.

    `pairs`: of a root rollout and a continuation from its prefix, over all prompts. `success`: mean outcome of these
    root rollouts. `rho`: nan where all outcomes are alike. `share_generated`, `share_tokens`, `share_turns`: of a
    rollout's generated tokens, of all its tokens, and of its turns (its seconds, where tools take them) that lie before
    the fork.
    """

    depth: int
    pairs: int
    success: float
    rho: float
    share_generated: float
    share_tokens: float
    share_turns: float

    @property
    def threshold(self) -> float:
        """The share of the cost above which a continuation beats a root: 2ρ/(1+ρ), with ρ at least 0."""
        rho = max(0.0, self.rho) if math.isfinite(self.rho) else self.rho
        return 2 * rho / (1 + rho)


def decided_by_depth(trees: Sequence[RolloutTree], *, width: int = 1) -> list[Depth]:
    """One entry for every `width` depths at which some prompt has two root rollouts with continuations; ascending.

    Only rollouts that go on after the depth are compared, as only those can be forked there.
    """
    pairs: dict[int, list[list[_Pair]]] = defaultdict(list)
    for tree in trees:
        for depth, found in _pairs(tree, width).items():
            if len(found) > 1:
                pairs[depth].append(found)
    return [_depth(depth, pairs[depth]) for depth in sorted(pairs)]


@dataclass(frozen=True, slots=True)
class _Pair:
    """Outcomes of a root rollout and of a continuation from its prefix; costs [generated, tokens, turns] of the prefix
    and of the mean of the two rollouts."""

    root: float
    continuation: float
    before: np.ndarray
    whole: np.ndarray


def _pairs(tree: RolloutTree, width: int) -> dict[int, list[_Pair]]:
    """By depth, one pair for each root rollout with a continuation there (the first: pairs are to be independent)."""
    found: dict[int, list[_Pair]] = defaultdict(list)
    known: set[tuple[int, int]] = set()
    for rollout in tree.rollouts:
        if rollout.kind != "continuation":
            continue
        root, depth = tree.nodes[rollout.anchor].rollout, tree.depths[rollout.anchor] // width * width
        passed = tree.rollouts[root]
        if passed.kind != "root" or (root, depth) in known:
            continue
        known.add((root, depth))
        whole = (_cost(tree, passed.leaf) + _cost(tree, rollout.leaf)) / 2
        pair = _Pair(passed.reward, rollout.reward, _cost(tree, rollout.anchor), whole)
        found[depth].append(pair)
    return found


def _cost(tree: RolloutTree, node: int) -> np.ndarray:
    path = [index for index in tree.path(node) if index != ROOT]
    generated = sum(tree.nodes[index].num_generated for index in path)
    return np.array([generated, sum(len(tree.nodes[index].token_ids) for index in path), len(path)], dtype=float)


def _depth(depth: int, prompts: Sequence[Sequence[_Pair]]) -> Depth:
    covariances, variances = [], []
    for pairs in prompts:
        roots, continuations = np.array([(pair.root, pair.continuation) for pair in pairs]).T
        covariances.append(np.cov(roots, continuations, ddof=1)[0, 1])
        variances.append((np.var(roots, ddof=1) + np.var(continuations, ddof=1)) / 2)
    every = [pair for pairs in prompts for pair in pairs]
    variance = float(np.mean(variances))
    shares = np.sum([pair.before for pair in every], axis=0) / np.sum([pair.whole for pair in every], axis=0)
    return Depth(
        depth=depth,
        pairs=len(every),
        success=float(np.mean([pair.root for pair in every])),
        rho=float(np.mean(covariances)) / variance if variance > 0 else float("nan"),
        share_generated=float(shares[0]),
        share_tokens=float(shares[1]),
        share_turns=float(shares[2]),
    )
