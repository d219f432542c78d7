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
    """Stage 2 of a prompt."""

    plan: PlanPrefixes
    per_root: int
    """So many continuations for every finished root rollout …"""
    rounds: int = 1
    """… spent in so many rounds."""
    value: Value | None = None
    """Estimates the prefixes."""
    oracle_rollouts: int = 0
    """> 0: measures them instead, each by so many continuations that do not enter the tree."""
    forks: bool = True
    """Whether turns are anchors. If not, no environment is forked."""
    buys_roots: bool = False
    """Whether the prompt is an anchor, too, as long as all its root rollouts agree."""
    root_strength: float | None = None
    """Pseudo rollouts behind what was believed of the prompt before."""
