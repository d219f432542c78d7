"""Compute the figures of an evaluation on held-out tasks, by the names under which they are logged.

A task's rollouts at one temperature are the roots of one tree.

Example: 2 tasks of 4 samples each, of which 1 and 4 succeed. Success (pass@1) is (1/4 + 1) / 2 = .625, pass@2 is
(1 − C(3, 2)/C(4, 2) + 1) / 2 = (1 − 3/6 + 1) / 2 = .75, and pass@4 is 1.
"""

import logging
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from trace_async.tracking.metrics import grouped, level_of
from trace_async.trees.tree import RolloutTree

log = logging.getLogger(__name__)


def temperature_name(temperature: float) -> str:
    """Return `t1.0` or `t0.0`; with all its digits where one does not tell it from others (`t0.95`)."""
    short = f"{temperature:.1f}"
    return f"t{short}" if float(short) == temperature else f"t{temperature!r}"


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """Estimate the chance that one of k samples passes, from `num_samples` ≥ k of which `num_passed` did.

    1 − C(n − c, k) / C(n, k), which is unbiased (Chen et al. 2021, arXiv 2107.03374, eq. 1).
    """
    return 1 - math.comb(num_samples - num_passed, k) / math.comb(num_samples, k)


def heldout_figures(trees: Sequence[RolloutTree], temperature: float, num_samples: int) -> dict[str, float]:
    """Compute held-out success at a temperature: over all tasks, by kind and by domain, and the verifier's metrics.

    `trees` holds one tree for every task, with up to `num_samples` rollouts. A task counts with the mean of its
    rollouts. With two samples or more, `heldout/pass_at_k` is given for k = 2, 4, … and `num_samples`; a rollout
    passes when its reward is 1. `heldout/lost_tasks` counts tasks of which every rollout broke down. If more than one
    rollout in ten broke down, no success is reported, because the average of the others would mislead.
    """
    suffix = temperature_name(temperature)
    whole = [tree for tree in trees if tree.rollouts]
    num_played, num_wanted = sum(len(tree.rollouts) for tree in whole), num_samples * len(trees)
    figures = {
        f"heldout/num_tasks_{suffix}": float(len(whole)),
        f"heldout/lost_tasks_{suffix}": float(len(trees) - len(whole)),
    }
    if num_played < num_wanted:
        errors = dict(sum((Counter(tree.failures) for tree in trees), Counter()))
        log.error(
            "evaluation incomplete: %d of %d rollouts broke down: %s", num_wanted - num_played, num_wanted, errors
        )
    if num_played < 0.9 * num_wanted:
        return figures
    success = [(tree, float(np.mean([rollout.reward for rollout in tree.rollouts]))) for tree in whole]
    turns = [np.mean([_num_turns(tree, rollout.leaf) for rollout in tree.rollouts]) for tree in whole]
    figures |= {
        f"heldout/success_{suffix}": float(np.mean([value for _, value in success])),
        f"heldout/turns_{suffix}": float(np.mean(turns)),
    }
    # A kind without "-" is a level of its own; where further kinds are of that level, its name stands for all of them.
    kinds = grouped((tree.task.kind, value) for tree, value in success)
    kinds |= grouped((level_of(tree.task.kind), value) for tree, value in success)
    for kind, values in kinds.items():
        figures[f"heldout/success_{suffix}/{kind}"] = float(np.mean(values))
    for domain, values in grouped((tree.task.domain, value) for tree, value in success).items():
        figures[f"heldout/domain_{suffix}/{domain}"] = float(np.mean(values))
    for name, values in grouped((n, v) for tree in whole for r in tree.rollouts for n, v in r.metrics.items()).items():
        figures[f"heldout/env/{name}_{suffix}"] = float(np.sum(values)) / num_played
    return figures | _passes(whole, suffix, num_samples)


def _num_turns(tree: RolloutTree, leaf: int) -> int:
    return sum(tree.nodes[node].follows is None for node in tree.path(leaf)) - 1  # the prompt is no turn


def _passes(trees: Sequence[RolloutTree], suffix: str, num_samples: int) -> dict[str, float]:
    """Return pass@k over the tasks that have k rollouts; the others, which lost some, say nothing about it."""
    figures = {}
    for k in sorted({2**power for power in range(1, num_samples.bit_length())} | {num_samples}):
        known = [tree for tree in trees if len(tree.rollouts) >= k]
        if 1 < k <= num_samples and known:
            passed = [sum(rollout.reward == 1 for rollout in tree.rollouts) for tree in known]
            found = [pass_at_k(len(tree.rollouts), count, k) for tree, count in zip(known, passed, strict=True)]
            figures[f"heldout/pass_at_{k}_{suffix}"] = float(np.mean(found))
    return figures
