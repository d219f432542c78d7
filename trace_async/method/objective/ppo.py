"""PPO's clipped objective, which gives a clipped token no gradient."""

from typing import TYPE_CHECKING

from trace_async.method.objective.rule import Objective

if TYPE_CHECKING:
    from torch import Tensor


class Ppo(Objective):
    """P·min(ρ, 1 + ε_high) + N·min(max(ρ, 1 − ε_low), dual_clip).

    arXiv 1707.06347, eq. 7, with ε_low ≠ ε_high (DAPO, arXiv 2503.14476, eq. 10). The dual clip (arXiv 1912.09729,
    eq. 5; 0: off) bounds what a very likely token with negative advantage can do.
    """

    uses = frozenset({"dual_clip"})

    def gain(
        self, ratio: "Tensor", learner_logprobs: "Tensor", positive: "Tensor", negative: "Tensor"
    ) -> "tuple[Tensor, Tensor]":
        gain = ratio.clamp(max=1 + self.settings.eps_clip_high)
        harm = ratio.clamp(min=1 - self.settings.eps_clip_low)
        if self.settings.dual_clip:
            harm = harm.clamp(max=self.settings.dual_clip)
        clipped = ((gain < ratio) & (positive > 0)) | ((harm != ratio) & (negative < 0))
        return positive * gain + negative * harm, clipped
