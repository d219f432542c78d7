"""How good values are: Brier score, AUC and calibration, by depth, within prompts and between them.

Stage 1 chooses between prompts, Stage 2 inside one: a model that only knows which prompts are hard has a good AUC and
is of no use to Stage 2. So pairs of rollouts of one prompt (`auc_within`) are counted apart from pairs of rollouts of
two prompts (`auc_between`). Outcomes may be any number in [0, 1].
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trace_async.method.knapsack import FloatArray
from trace_async.trees.tree import RolloutTree


def brier(values: FloatArray, outcomes: FloatArray) -> float:
    """Mean squared difference; nan without any."""
    return float(np.mean((values - outcomes) ** 2)) if len(values) else float("nan")


def auc(values: FloatArray, outcomes: FloatArray) -> float:
    """Chance that a success was given a higher value than a failure, ties half; nan unless both occur."""
    won, pairs = _pairs(values, outcomes)
    return won / pairs if pairs > 0 else float("nan")


def _pairs(values: FloatArray, outcomes: FloatArray) -> tuple[float, float]:
    """(pairs of a success and a failure in which the success has the higher value, ties half; all such pairs).

    An outcome r in [0, 1] counts r as a success and 1 − r as a failure.
    """
    levels, level = np.unique(values, return_inverse=True)
    successes = np.bincount(level, weights=outcomes, minlength=len(levels))
    failures = np.bincount(level, weights=1 - outcomes, minlength=len(levels))
    failures_below = np.cumsum(failures) - failures
    won = float((successes * (failures_below + failures / 2)).sum())
    return won, float(successes.sum() * failures.sum())


def calibration_error(values: FloatArray, outcomes: FloatArray, *, num_bins: int = 10) -> float:
    """Expected calibration error: mean over the values of |mean value − mean outcome| of their bin of equal width."""
    if not len(values):
        return float("nan")
    bins = np.minimum((values * num_bins).astype(int), num_bins - 1)
    gaps = np.bincount(bins, weights=values - outcomes, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(values))


@dataclass(frozen=True, slots=True)
class ValuedOutcomes:
    """Values beside what came of them, in flat arrays of one length.

    `outcomes` in [0, 1]; `depths` in turns (0: the prompt); `prompts`: a number per prompt.
    """

    values: FloatArray
    outcomes: FloatArray
    depths: FloatArray
    prompts: FloatArray

    def metrics(self) -> dict[str, float]:
        """Of all: `brier`, `brier_base` (of always saying the mean outcome), `auc`, `calibration`. The same by depth,
        as `brier/depth_2`. Of prefixes (depth ≥ 1): `auc_prefix`, and `auc_within`, `auc_between` with the number of
        their pairs, all pairs being of one depth.
        """
        if not len(self.values):
            return {}
        found = self._scores("")
        for depth in np.unique(self.depths):
            found |= self.where(self.depths == depth)._scores(f"/depth_{int(depth)}")
        return {name: value for name, value in (found | self._prefix_scores()).items() if not np.isnan(value)}

    def where(self, chosen: np.ndarray) -> "ValuedOutcomes":
        """The rows for which `chosen` [rows] is true."""
        return ValuedOutcomes(self.values[chosen], self.outcomes[chosen], self.depths[chosen], self.prompts[chosen])

    def _scores(self, suffix: str) -> dict[str, float]:
        return {
            f"brier{suffix}": brier(self.values, self.outcomes),
            f"brier_base{suffix}": float(np.var(self.outcomes)),
            f"auc{suffix}": auc(self.values, self.outcomes),
            f"calibration{suffix}": calibration_error(self.values, self.outcomes),
        }

    def _prefix_scores(self) -> dict[str, float]:
        prefixes = self.where(self.depths > 0)
        within, everywhere = np.zeros(2), np.zeros(2)
        for depth in np.unique(prefixes.depths):
            rows = prefixes.where(prefixes.depths == depth)
            everywhere += _pairs(rows.values, rows.outcomes)
            _, prompt = np.unique(rows.prompts, return_inverse=True)
            successes, failures = np.bincount(prompt, rows.outcomes), np.bincount(prompt, 1 - rows.outcomes)
            for mixed in np.flatnonzero(successes * failures):
                own = prompt == mixed
                within += _pairs(rows.values[own], rows.outcomes[own])
        found = {"auc_prefix": auc(prefixes.values, prefixes.outcomes)}
        for name, (won, pairs) in (("within", within), ("between", everywhere - within)):
            if pairs > 0:
                found |= {f"auc_{name}": won / pairs, f"pairs_{name}": pairs}
        return found


def root_outcomes(trees: Sequence[RolloutTree], values: Sequence[FloatArray]) -> ValuedOutcomes:
    """Each prompt and each turn but the last of every root rollout, with that rollout's reward.

    `values[i]` [nodes of tree i], nan where there is none. Only root rollouts: which continuations exist depends on
    outcomes (Stage 2).
    """
    rows = [
        (tree_values[node], rollout.reward, depth, prompt)
        for prompt, (tree, tree_values) in enumerate(zip(trees, values, strict=True))
        for rollout in tree.rollouts
        if rollout.kind == "root"
        for depth, node in enumerate(tree.path(rollout.leaf)[:-1])
        if not np.isnan(tree_values[node])
    ]
    return ValuedOutcomes(*np.array(rows, dtype=float).reshape(len(rows), 4).T)
