"""CISPO, which clips a token's weight and leaves every token its gradient."""

from typing import TYPE_CHECKING

from trace_async.method.objective.rule import Objective

if TYPE_CHECKING:
    from torch import Tensor


class Cispo(Objective):
    """min(ρ, 1 + ε_high)·(P + N)·log π, with the first factor detached.

    MiniMax-M1 (arXiv 2506.13585), eqs. 4 and 5. Like there, the factor has no lower bound.
    """

    def gain(
        self, ratio: "Tensor", learner_logprobs: "Tensor", positive: "Tensor", negative: "Tensor"
    ) -> "tuple[Tensor, Tensor]":
        highest = 1 + self.settings.eps_clip_high
        credit = positive + negative
        return ratio.detach().clamp(max=highest) * credit * learner_logprobs, (ratio > highest) & (credit != 0)
