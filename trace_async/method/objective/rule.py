"""What an objective is."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from trace_async.method.settings import LossSettings

if TYPE_CHECKING:  # settings are checked without loading torch
    from torch import Tensor


class Objective(ABC):
    """Says what each token gains. Subclass it for one of your own:

        class Reinforce(Objective):
            def gain(self, ratio, learner_logprobs, positive, negative):
                return (positive + negative) * learner_logprobs, torch.zeros_like(ratio, dtype=torch.bool)

    and name it as `loss.objective=my_package.my_module:Reinforce`.
    """

    uses: ClassVar[frozenset[str]] = frozenset()
    """Which of the optional settings it obeys, of which `dual_clip` is the only one. Setting another one is refused."""

    def __init__(self, settings: LossSettings) -> None:
        self.settings = settings

    @abstractmethod
    def gain(
        self, ratio: "Tensor", learner_logprobs: "Tensor", positive: "Tensor", negative: "Tensor"
    ) -> "tuple[Tensor, Tensor]":
        """Return the gain, which is maximised, and which tokens were clipped. All tensors are [E], one for each token.

        `ratio` is ρ = learner / anchor and `learner_logprobs` log π, both with their gradients. `positive` ≥ 0 and
        `negative` ≤ 0 are the sums P and N of the token's credit (`NodeCredit`). A gain that is linear in P and in N is
        exact for tokens that several branches share.
        """
