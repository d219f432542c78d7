"""Read V(H) from a hidden state: logistic regression, refitted to a window of rows at every update.

A few hundred numbers fitted to a few thousand rows take milliseconds, so the head is fitted to its optimum each time
and follows the trunk as that drifts; a head that only took a few gradient steps would lag behind it.
"""

from dataclasses import dataclass

import numpy as np

from trace_async.method.knapsack import FloatArray

# Values stay this far from 0 and 1, so that a posterior is never certain.
MARGIN = 1e-3
# From the last head on; measured, more change no value by what matters and take three times as long.
_MAX_ITERATIONS = 12


@dataclass(frozen=True, slots=True)
class StateHead:
    """V = sigmoid(weights · (state − mean) / scale + bias), clipped to MARGIN … 1 − MARGIN.

    `mean`, `scale`, `weights` are [width]. The same states in any other unit, or moved, give the same head.
    """

    mean: FloatArray
    scale: FloatArray
    weights: FloatArray
    bias: float

    @classmethod
    def untrained(cls, width: int) -> "StateHead":
        """Says one half of everything."""
        return cls(np.zeros(width), np.ones(width), np.zeros(width), 0.0)

    def values(self, states: np.ndarray) -> FloatArray:
        """V [rows] of states [rows, width]."""
        logits = (states - self.mean) / self.scale @ self.weights + self.bias
        values: FloatArray = np.clip(_sigmoid(logits), MARGIN, 1 - MARGIN)
        return values

    def refitted(
        self, states: np.ndarray, targets: FloatArray, weights: FloatArray, *, l2: float
    ) -> "StateHead | None":
        """A head that lowers Σ w·CE(target, V) / Σ w + l2/(2·rows)·|weights|² over rows [rows, width], [rows], [rows].

        So the penalty counts as much as `l2` rows do: it holds the head back while there are few.

        It goes on from this one for a few iterations of L-BFGS, so that a few refits reach the optimum and follow it.

        None when a row or the fit is not finite: the caller keeps the head that it has.
        """
        # Here, because prompts only read with heads, and scipy takes long to import.
        from scipy.optimize import minimize

        mean, scale = states.mean(axis=0, dtype=np.float64), states.std(axis=0, dtype=np.float64) + 1e-6
        shares, penalty = weights / weights.sum(), l2 / len(states)
        if not all(np.isfinite(part).all() for part in (mean, scale, targets)):
            return None
        # In float32, which halves the time: a step of the fit reads all rows twice.
        rows = (states - mean.astype(np.float32)) / scale.astype(np.float32)

        def loss(theta: FloatArray) -> tuple[float, FloatArray]:
            logits = (rows @ theta[:-1].astype(np.float32)).astype(np.float64) + theta[-1]
            # CE(t, sigmoid(z)) = log(1 + e^z) − t·z, without overflow.
            errors = np.logaddexp(0, logits) - targets * logits
            residuals = shares * (_sigmoid(logits) - targets)
            slope = (residuals.astype(np.float32) @ rows).astype(np.float64) + penalty * theta[:-1]
            gradient = np.append(slope, residuals.sum())
            return float(shares @ errors + penalty / 2 * theta[:-1] @ theta[:-1]), gradient

        # The last head, moved into this window's units.
        start = self.weights / self.scale * scale
        bias = self.bias + (mean - self.mean) / self.scale @ self.weights
        found = minimize(
            loss, np.append(start, bias), jac=True, method="L-BFGS-B", options={"maxiter": _MAX_ITERATIONS}
        ).x
        return StateHead(mean, scale, found[:-1], float(found[-1])) if np.isfinite(found).all() else None


def _sigmoid(logits: FloatArray) -> FloatArray:
    return 0.5 * (1 + np.tanh(logits / 2))
