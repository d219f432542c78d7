"""What Stage 2 of a prompt is asked to do."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from trace_async.method.anchors import Anchor
from trace_async.types import PrefixQuery

Value = Callable[[Sequence[PrefixQuery]], Awaitable[Sequence[np.ndarray]]]


class PlanPrefixes(Protocol):
    """Stage 2: how many of `budget` continuations each anchor gets."""

    def __call__(self, anchors: Sequence[Anchor], budget: int) -> np.ndarray: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Expansion:
    """Stage 2 of a prompt: `per_root` continuations for every finished root rollout, spent in `rounds` rounds.

    `value` estimates the prefixes; `oracle_rollouts` > 0 measures them instead, each by so many continuations that do
    not enter the tree.
    """

    plan: PlanPrefixes
    per_root: int
    rounds: int = 1
    value: Value | None = None
    oracle_rollouts: int = 0
