"""How good values are: Brier score, AUC and calibration, by depth. Weighted; outcomes may be any number in [0, 1]."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trace_async.method.marginals import FloatArray
from trace_async.trees.tree import RolloutTree


def brier(values: FloatArray, outcomes: FloatArray) -> float:
    """Mean squared difference; nan without any."""
    return float(np.mean((values - outcomes) ** 2)) if len(values) else float("nan")


def auc(values: FloatArray, outcomes: FloatArray) -> float:
    """Chance that a success was given a higher value than a failure, ties half; nan unless both occur.

    An outcome r in [0, 1] counts r as a success and 1 − r as a failure.
    """
    levels, level = np.unique(values, return_inverse=True)
    successes = np.bincount(level, weights=outcomes, minlength=len(levels))
    failures = np.bincount(level, weights=1 - outcomes, minlength=len(levels))
    pairs = successes.sum() * failures.sum()
    failures_below = np.cumsum(failures) - failures
    return float((successes * (failures_below + failures / 2)).sum() / pairs) if pairs > 0 else float("nan")


def calibration_error(values: FloatArray, outcomes: FloatArray, *, num_bins: int = 10) -> float:
    """Expected calibration error: mean over the values of |mean value − mean outcome| of their bin of equal width."""
    if not len(values):
        return float("nan")
    bins = np.minimum((values * num_bins).astype(int), num_bins - 1)
    gaps = np.bincount(bins, weights=values - outcomes, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(values))


@dataclass(frozen=True, slots=True)
class ValuedOutcomes:
    """Values beside what came of them, in flat arrays; `outcomes` in [0, 1], `depths` in turns (0: the prompt)."""

    values: FloatArray
    outcomes: FloatArray
    depths: FloatArray

    def metrics(self) -> dict[str, float]:
        """`brier`, `brier_base` (of always saying the mean outcome), `auc`, `calibration`, and Brier, AUC by depth."""
        if not len(self.values):
            return {}
        found = {
            "brier": brier(self.values, self.outcomes),
            "brier_base": float(np.var(self.outcomes)),
            "auc": auc(self.values, self.outcomes),
            "calibration": calibration_error(self.values, self.outcomes),
        }
        for depth in np.unique(self.depths):
            at = self.depths == depth
            found[f"brier/depth_{int(depth)}"] = brier(self.values[at], self.outcomes[at])
            found[f"auc/depth_{int(depth)}"] = auc(self.values[at], self.outcomes[at])
        return {name: value for name, value in found.items() if not np.isnan(value)}


def root_outcomes(trees: Sequence[RolloutTree], values: Sequence[FloatArray]) -> ValuedOutcomes:
    """Each prompt and each turn but the last of every root rollout, with that rollout's reward.

    `values[i]` [nodes of tree i], nan where there is none. Only root rollouts: which continuations exist depends on
    outcomes (Stage 2).
    """
    rows = [
        (tree_values[node], rollout.reward, depth)
        for tree, tree_values in zip(trees, values, strict=True)
        for rollout in tree.rollouts
        if rollout.kind == "root"
        for depth, node in enumerate(tree.path(rollout.leaf)[:-1])
        if not np.isnan(tree_values[node])
    ]
    columns = np.array(rows, dtype=float).reshape(len(rows), 3).T
    return ValuedOutcomes(*columns)
