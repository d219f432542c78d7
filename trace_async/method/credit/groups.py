"""Advantages inside a group of outcomes."""

from collections.abc import Sequence

import numpy as np

from trace_async.method.credit.rule import EPSILON
from trace_async.method.knapsack import FloatArray


def leave_one_out(rewards: Sequence[float], *, normalize_std: bool = False) -> list[float]:
    """Each reward minus the mean of the others; 0 for one alone, and exactly 0 where all are equal."""
    if len(set(rewards)) < 2:
        return [0.0] * len(rewards)
    total = sum(rewards)
    scale = std(np.array(rewards)) + EPSILON if normalize_std else 1.0
    return [(reward - (total - reward) / (len(rewards) - 1)) / scale for reward in rewards]


def mean_of(values: FloatArray) -> float:
    """The mean, which is exactly the value itself where all are equal: three times .1 makes .10000000000000002."""
    return float(values[0]) if (values == values[0]).all() else float(values.mean())


def centred(values: FloatArray) -> FloatArray:
    """Values minus their mean; exactly 0 where all are equal. None: none."""
    return values - mean_of(values) if len(values) else values


def standardised(values: FloatArray) -> FloatArray:
    """Values minus their mean over their standard deviation + 1e-6; a lone one has mean 0 and deviation 1."""
    if len(values) < 2:
        return values / (1.0 + EPSILON)
    return np.asarray(centred(values) / (std(values) + EPSILON))


def std(values: FloatArray) -> float:
    """Standard deviation with n − 1; 0 for one value."""
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0
