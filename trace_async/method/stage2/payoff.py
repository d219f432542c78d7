"""When a continuation teaches more than a new root rollout of the same cost (docs/METHOD.md, section 4)."""

import math
from dataclasses import dataclass

MIN_ANCHORS = 16
"""Anchors with at least two continuations before a depth may be closed."""


@dataclass(frozen=True, slots=True)
class DepthFigures:
    """What was measured at one depth; nan where nothing was."""

    num_anchors: int
    """Anchors with at least two continuations."""
    rho: float
    """Share of the outcome's variance that the prefix has decided."""
    share_before: float
    """s, share of a rollout's generated tokens that lie before the fork."""
    share_before_s: float = math.nan
    """The same in seconds: where tools are slow, a prefix is dearer than its tokens say."""
    num_roots: float = 2.0
    """Root rollouts of the prompts whose turns were continued, on average."""
    num_continuations: float = 2.0
    """Continuations of an anchor, on average."""

    @property
    def break_even(self) -> float:
        """Continuations teach more than new root rollouts of the same cost only if s is above it."""
        return break_even(self.rho, self.share_before, self.num_roots, self.num_continuations)

    @property
    def measured(self) -> bool:
        """Whether enough was seen for a decision."""
        return self.num_anchors >= MIN_ANCHORS and not math.isnan(self.rho)

    def pays(self, *, in_seconds: bool = False) -> bool:
        """True as long as too little was measured to say no."""
        return not self.measured or not (self.share_before_s if in_seconds else self.share_before) <= self.break_even


def verdict(is_closed: bool, figures: DepthFigures | None, *, again: bool, in_seconds: bool) -> str:
    """What was decided of a depth and why, in words. `again`: it is not the first decision of this depth."""
    if figures is None or not figures.measured:  # too little of it is left in the window
        return "are tried again: too little was seen of them lately"
    counted, s, other, s_other = "tokens", figures.share_before, "seconds", figures.share_before_s
    if in_seconds:
        counted, s, other, s_other = other, s_other, counted, s
    beside = "" if math.isnan(s_other) else f" ({s_other:.2f} of its {other})"
    decided = "do not pay" if is_closed else "pay again" if again else "pay"
    return (
        f"{decided}: s = {s:.2f} of a rollout's {counted}{beside}"
        f" lie before the fork, and they pay above {figures.break_even:.2f} (ρ = {figures.rho:.2f}, "
        f"{figures.num_roots:.1f} roots, {figures.num_continuations:.1f} continuations; {figures.num_anchors} anchors)"
    )


def break_even(
    rho: float, done: float, num_roots: float, num_continuations: float, *, decided_by_all: float = 1.0
) -> float:
    """The share of a rollout's cost before the fork above which continuations teach more than roots of the same cost.

    `rho`: share of the outcome's variance that the prefix has decided, of the `decided_by_all` that all turns decide.
    `done`: share of a rollout's tokens that the prefix holds. For m `num_roots` and K `num_continuations` of each:

        1 − (I − (m − 1))/(m·K),   I = (1 + γ)² / ( 1/(m − 1) + (1 − ρ)(1 − done)(K + 1)/(K²·m) )

    I: the tree's gradient is as sure as that of I + 1 roots (leave-one-out among n roots is as sure as n − 1 rollouts).
    A continuation trains only what follows the fork, γ = (decided_by_all − ρ)/decided_by_all of the gradient's square;
    its outcome varies by 1 − ρ of the prompt's, and K of them are compared with each other and with the rollout that
    passed. A lone root teaches nothing, so then it is the continuations alone. How well it holds: docs/METHOD.md.
    """
    m, k = num_roots, num_continuations
    suffix = (decided_by_all - rho) / decided_by_all
    varies = (1 - rho) * (1 - done) * (k + 1) / (k * k * m)
    if m < 1.5:
        return 1 - (suffix**2 / varies) / (m * k) if varies > 0 else 1.0
    return 1 - ((1 + suffix) ** 2 / (1 / (m - 1) + varies) - (m - 1)) / (m * k)
