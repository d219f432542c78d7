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

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from trace_async.trees.tree import Fault, RolloutTree

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalRollout:
    """One held-out rollout."""

    task_id: str
    domain: str
    kind: str
    reward: float | None
    """The verifier's reward (None: the rollout was lost)."""
    metrics: Mapping[str, float]
    """The environment's further numbers about it."""
    generated_tokens: int
    num_turns: int
    error: str = ""
    """The kind of loss when the rollout was lost."""
    faults: Mapping[str, Fault] = field(default_factory=dict)
    """What broke down on the way, as in `RolloutTree`."""


def eval_rollout(tree: RolloutTree) -> EvalRollout:
    """Return the one rollout of a tree that was grown for evaluation."""
    rollout = tree.rollouts[0] if tree.rollouts else None
    return EvalRollout(
        task_id=tree.task.id,
        domain=tree.task.domain,
        kind=tree.task.kind,
        reward=rollout.reward if rollout else None,
        metrics=rollout.metrics if rollout else {},
        generated_tokens=tree.num_generated_tokens,
        num_turns=sum(node.follows is None for node in tree.nodes) - 1,
        error=", ".join(tree.failures),
        faults=tree.faults,
    )


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
    for level, number in _count(level_of(tree.task.kind) for tree in both).items():
        metrics[f"train/prompts_both_outcomes/{level}"] = float(number)
    for domain, rewards in _group((tree.task.domain, r.reward) for tree in trees for r in tree.rollouts).items():
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


def eval_metrics(rollouts: Sequence[EvalRollout], temperature: float) -> dict[str, float]:
    """Compute held-out success at a temperature: over all tasks, by kind and by domain, and the verifier's metrics.

    `heldout/lost_tasks` counts tasks that broke down; if there are any, the evaluation is incomplete. If more than one
    in ten broke down, no success is reported, because the average of the others would mislead.
    """
    suffix = temperature_name(temperature)
    whole = [(rollout, rollout.reward) for rollout in rollouts if rollout.reward is not None]
    num_lost = len(rollouts) - len(whole)
    metrics = {f"heldout/num_tasks_{suffix}": float(len(whole)), f"heldout/lost_tasks_{suffix}": float(num_lost)}
    if num_lost:
        errors = _count(rollout.error for rollout in rollouts if rollout.reward is None)
        log.error("evaluation incomplete: %d of %d rollouts broke down: %s", num_lost, len(rollouts), errors)
    if len(whole) < 0.9 * len(rollouts):
        return metrics
    metrics |= {
        f"heldout/success_{suffix}": float(np.mean([reward for _, reward in whole])),
        f"heldout/turns_{suffix}": float(np.mean([r.num_turns for r, _ in whole])),
    }
    # A kind without "-" is a level of its own; where further kinds are of that level, its name stands for all of them.
    groups = _group((r.kind, reward) for r, reward in whole) | _group((level_of(r.kind), reward) for r, reward in whole)
    for group, values in groups.items():
        metrics[f"heldout/success_{suffix}/{group}"] = float(np.mean(values))
    for domain, values in _group((r.domain, reward) for r, reward in whole).items():
        metrics[f"heldout/domain_{suffix}/{domain}"] = float(np.mean(values))
    for name, values in _group((name, value) for r, _ in whole for name, value in r.metrics.items()).items():
        metrics[f"heldout/env/{name}_{suffix}"] = float(np.sum(values)) / len(whole)
    return metrics


def temperature_name(temperature: float) -> str:
    """Return `t1.0` or `t0.0`; with all its digits where one does not tell it from others (`t0.95`)."""
    short = f"{temperature:.1f}"
    return f"t{short}" if float(short) == temperature else f"t{temperature!r}"


def _group(pairs: Iterable[tuple[str, float]]) -> dict[str, list[float]]:
    groups: dict[str, list[float]] = defaultdict(list)
    for key, value in pairs:
        groups[key].append(value)
    return groups


def _count(keys: Iterable[str]) -> dict[str, int]:
    return dict(Counter(keys))
