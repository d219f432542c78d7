"""Compute the figures of an update's trees and of an evaluation, by the names under which they are logged.

Every source has a name space of its own, so that no figure can take another one's name:

    train/ budget/ tokens/ cache/        of an update's trees          learner/ predictor/    of the two models
    train/reward/DOMAIN                  of one domain's               time/ idle/ generators/   of the loop
    train/prompts_both_outcomes/LEVEL    of one level's                faults/METHOD.KIND     of what broke down
    heldout/NAME_tT                      ours, of an evaluation at temperature T
    heldout/success_tT/KIND              of one kind; a level ("middle") holds all its kinds ("middle-3hop")
    heldout/domain_tT/DOMAIN             of one domain
    heldout/env/NAME_tT                  what the environment measured itself

What comes from outside (kinds, domains, names of an environment's metrics) stands last, behind a prefix of ours.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from trace_async.trees.tree import RolloutTree


def level_of(kind: str) -> str:
    """Return the part of a kind before the first "-", by which reports group: "middle" of "middle-3hop"."""
    return kind.partition("-")[0]


def tree_metrics(trees: Sequence[RolloutTree], policy_version: int) -> dict[str, float]:
    """Compute the figures of one update's trees.

    `train/reward` and `train/overlong_share` are of root rollouts only, because continuations start at chosen turns
    and would bias them. `train/effective_ratio` is the share of prompts whose leaves have both outcomes.
    `cache/depth_d` is the share of the prompt tokens of turn d's requests that came from the KV cache.
    """
    roots = [rollout for tree in trees for rollout in tree.rollouts if rollout.kind == "root"]
    both = [tree for tree in trees if tree.has_both_outcomes]
    staleness = [policy_version - tree.oldest_policy_version for tree in trees]
    metrics = {
        "train/reward": float(np.mean([rollout.reward for rollout in roots])),
        "train/num_prompts": float(len(trees)),
        "train/effective_ratio": len(both) / len(trees),
        "train/prompts_both_outcomes": float(len(both)),
        "train/overlong_share": float(np.mean([rollout.metrics.get("overlong", 0.0) for rollout in roots])),
        "train/staleness_mean": float(np.mean(staleness)),
        "train/staleness_max": float(max(staleness)),
        "budget/roots": float(len(roots)),
        "budget/continuations": float(sum(len(tree.rollouts) for tree in trees) - len(roots)),
        "budget/trajectory_equivalents": sum(tree.trajectory_equivalents for tree in trees),
        "tokens/generated": float(sum(tree.num_generated_tokens for tree in trees)),
        "tokens/unique": float(sum(tree.num_unique_tokens for tree in trees)),
    }
    for level, number in Counter(level_of(tree.task.kind) for tree in both).items():
        metrics[f"train/prompts_both_outcomes/{level}"] = float(number)
    for domain, rewards in grouped((tree.task.domain, r.reward) for tree in trees for r in tree.rollouts).items():
        metrics[f"train/reward/{domain}"] = float(np.mean(rewards))
    return metrics | _cache_metrics(trees)


def _cache_metrics(trees: Sequence[RolloutTree]) -> dict[str, float]:
    asked: dict[int, int] = defaultdict(int)
    cached: dict[int, int] = defaultdict(int)
    for tree in trees:
        for node, depth in zip(tree.nodes[1:], tree.depths[1:], strict=True):
            asked[depth] += node.prompt_tokens
            cached[depth] += node.cached_tokens
    total = max(1, sum(asked.values()))
    metrics = {"tokens/cached_share": sum(cached.values()) / total, "tokens/prefill": float(total)}
    for depth in sorted(asked):
        metrics[f"cache/depth_{depth}"] = cached[depth] / max(1, asked[depth])
    return metrics


def grouped(pairs: Iterable[tuple[str, float]]) -> dict[str, list[float]]:
    """Return key → its values, in the order of their coming."""
    groups: dict[str, list[float]] = defaultdict(list)
    for key, value in pairs:
        groups[key].append(value)
    return groups
