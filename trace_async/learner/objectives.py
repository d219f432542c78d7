"""Compute what a token gains by its ratio, the part of the loss in which trainers differ.

Every objective is one function. It takes the ratio ρ = learner / anchor [E] with its gradient, the learner's
log-probabilities [E] and the entries. It returns the gain [E], which is maximised, and which entries [E] it clipped.
To add one, write a function here and name it in `OBJECTIVES` and in `loss.objective`.
"""

from collections.abc import Callable

import torch

from trace_async.config import LossConfig
from trace_async.packing.layout import Entries

Objective = Callable[[torch.Tensor, torch.Tensor, Entries, LossConfig], tuple[torch.Tensor, torch.Tensor]]


def ppo(
    ratio: torch.Tensor, learner_logprobs: torch.Tensor, entries: Entries, config: LossConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return P·min(ρ, 1 + ε_high) + N·min(max(ρ, 1 − ε_low), dual_clip). A clipped token has no gradient.

    arXiv 1707.06347, eq. 7, with ε_low ≠ ε_high (DAPO, arXiv 2503.14476, eq. 10) and the dual clip of arXiv 1912.09729.
    """
    gain = ratio.clamp(max=1 + config.eps_clip_high)
    harm = ratio.clamp(min=1 - config.eps_clip_low)
    if config.dual_clip:
        harm = harm.clamp(max=config.dual_clip)
    clipped = ((gain < ratio) & (entries.positive > 0)) | ((harm != ratio) & (entries.negative < 0))
    return entries.positive * gain + entries.negative * harm, clipped


def cispo(
    ratio: torch.Tensor, learner_logprobs: torch.Tensor, entries: Entries, config: LossConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return min(ρ, 1 + ε_high)·(P + N)·log π, with the first factor detached.

    That factor is clipped, but every token keeps a gradient. MiniMax-M1 (arXiv 2506.13585), eqs. 4 and 5; like there,
    it has no lower bound.
    """
    weight = ratio.detach().clamp(max=1 + config.eps_clip_high)
    credit = entries.positive + entries.negative
    return weight * credit * learner_logprobs, (ratio > 1 + config.eps_clip_high) & (credit != 0)


OBJECTIVES: dict[str, Objective] = {"ppo": ppo, "cispo": cispo}
