"""What is believed about each prompt's success: the value model as the prior, the prompt's own counts as evidence."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from trace_async.method.knapsack import FloatArray
from trace_async.trees.tree import RolloutTree
from trace_async.types import Json

# Prior strengths tried when it is fitted, in pseudo rollouts.
STRENGTHS = np.geomspace(0.5, 64.0, 15)


@dataclass(frozen=True, slots=True)
class Estimates:
    """Beta(a_i, b_i) for each candidate prompt; `a` and `b` are [prompts], > 0.

    `tokens` [prompts] > 0: what a root rollout of each is expected to generate. None: nothing was seen yet. `price`: λ,
    the contrast that a token has to bring. None: there is none yet.
    """

    a: FloatArray
    b: FloatArray
    tokens: FloatArray | None = None
    price: float | None = None

    def __post_init__(self) -> None:
        if self.a.shape != self.b.shape or self.a.ndim != 1 or not ((self.a > 0) & (self.b > 0)).all():
            raise ValueError("Estimates: a and b must be flat, equally long and > 0")

    @classmethod
    def unknown(cls, size: int) -> "Estimates":
        """Of prompts that nobody has asked about: every success probability is as likely as any other."""
        return cls(np.ones(size), np.ones(size))

    @classmethod
    def of_outcomes(cls, rewards: Sequence[Sequence[float]]) -> "Estimates":
        """From each prompt's measured rewards in [0, 1] alone, with Jeffreys' prior: no number of them is certain."""
        wins = np.array([sum(some) for some in rewards])
        return cls(0.5 + wins, 0.5 + np.array([len(some) for some in rewards]) - wins)

    @property
    def size(self) -> int:
        """How many prompts."""
        return len(self.a)

    @property
    def mean(self) -> FloatArray:
        return self.a / (self.a + self.b)

    @property
    def strength(self) -> FloatArray:
        """Pseudo rollouts behind each mean."""
        return self.a + self.b


@dataclass(slots=True)
class Counts:
    """A prompt's root rollouts so far, as of policy version `version`: older ones count less."""

    successes: float
    failures: float
    version: int


class SuccessEstimator:
    """Beta posteriors of prompts: Beta(s·V + successes, s·(1−V) + failures), V from the value model.

    Only root rollouts count, since Stage 2 picks continuations by outcome. A count loses half its weight every
    `half_life` policy versions, as the policy moves on (0: never). The prior strength s starts at `prior_strength` and
    is fitted to the last `window` prompts: the s under which their outcomes, given the V and the counts that they had
    before, are most likely (beta-binomial). A wrong or vague model thus gets a small s and leaves the word to the
    counts. The counts before must be part of it: Stage 1 buys prompts whose counts look even, so the outcomes of what
    was bought crowd around ½ and would make the model look better than it is (5.4 for 1.0 in test_posterior.py).
    """

    def __init__(self, prior_strength: float, *, fit: bool = True, half_life: float = 8.0, window: int = 512) -> None:
        self.strength = prior_strength
        self.fit = fit
        self.half_life = half_life
        self.counts: dict[str, Counts] = {}
        self.observed: deque[tuple[float, float, float, float, float]] = deque(maxlen=window)

    def estimate(self, task_ids: Sequence[str], values: FloatArray, version: int) -> Estimates:
        """`values` [prompts]: V of the value model, strictly between 0 and 1."""
        evidence = np.array([self._counts(task_id, version) for task_id in task_ids]).reshape(-1, 2)
        return Estimates(
            a=self.strength * values + evidence[:, 0],
            b=self.strength * (1 - values) + evidence[:, 1],
        )

    def observe(self, trees: Sequence[RolloutTree], values: FloatArray, version: int) -> None:
        """Root rollouts of finished trees; `values` [trees]: V of their prompts before these outcomes were learnt."""
        for tree, value in zip(trees, values, strict=True):
            rewards = [rollout.reward for rollout in tree.rollouts if rollout.kind == "root"]
            successes, failures = sum(rewards), len(rewards) - sum(rewards)
            before = self._counts(tree.task.id, version)
            self.counts[tree.task.id] = Counts(before[0] + successes, before[1] + failures, version)
            if len(rewards) > 1:
                self.observed.append((float(value), successes, failures, *before))
        if self.fit and len(self.observed) >= 16:
            self.strength = fit_strength(*np.array(self.observed).T)

    def _counts(self, task_id: str, version: int) -> tuple[float, float]:
        found = self.counts.get(task_id)
        if found is None:
            return 0.0, 0.0
        kept = 0.5 ** ((version - found.version) / self.half_life) if self.half_life else 1.0
        return found.successes * kept, found.failures * kept

    def state(self) -> dict[str, Json]:
        """For a checkpoint; `load_state` takes it back."""
        return {
            "strength": self.strength,
            "counts": {i: [c.successes, c.failures, c.version] for i, c in self.counts.items()},
            "observed": [list(row) for row in self.observed],
        }

    def load_state(self, state: Mapping[str, Json]) -> None:
        self.strength = cast(float, state["strength"])
        counts = cast("Mapping[str, tuple[float, float, int]]", state["counts"])
        self.counts = {task_id: Counts(*row) for task_id, row in counts.items()}
        observed = cast("Sequence[Sequence[float]]", state["observed"])
        if any(len(row) != 5 for row in observed):
            raise ValueError("estimator: kept by an earlier version, without the counts before each outcome")
        self.observed = deque(((v, s, f, a, b) for v, s, f, a, b in observed), maxlen=self.observed.maxlen)


def fit_strength(
    values: FloatArray,
    successes: FloatArray,
    failures: FloatArray,
    successes_before: FloatArray | float = 0.0,
    failures_before: FloatArray | float = 0.0,
) -> float:
    """The strength s of `STRENGTHS` with the largest Σ log BetaBinomial(successes | s·V + before, s·(1−V) + before).

    Arrays [prompts]; `…_before`: each prompt's counts when the rollouts were bought.
    """
    # Here, because settings ask rules for their needs, and nobody should wait for scipy to read a setting.
    from scipy.special import betaln

    v = np.clip(values, 1e-3, 1 - 1e-3)
    a = STRENGTHS[:, None] * v + successes_before
    b = STRENGTHS[:, None] * (1 - v) + failures_before
    likelihood = (betaln(a + successes, b + failures) - betaln(a, b)).sum(axis=1)
    return float(STRENGTHS[np.argmax(likelihood)])
