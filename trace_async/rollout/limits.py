"""What bounds a rollout: how its turns are sampled, its context, and how often it is tried again."""

from dataclasses import dataclass, replace

from trace_async.config import Config
from trace_async.types import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutLimits:
    """Sampling of a turn, tokens of a whole context, and how often a broken rollout is tried again."""

    sampling: SamplingParams
    max_context_tokens: int
    max_retries: int

    def at(self, temperature: float) -> "RolloutLimits":
        """The same at another temperature; at 0 (greedy) top-p and top-k say nothing."""
        sampling = replace(self.sampling, temperature=temperature)
        return replace(self, sampling=sampling if temperature > 0 else replace(sampling, top_p=1.0, top_k=0))


def rollout_limits(config: Config, stop_token_ids: tuple[int, ...]) -> RolloutLimits:
    """What the config says of a rollout in training."""
    sampling = config.sampling
    return RolloutLimits(
        sampling=SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_new_tokens=sampling.max_turn_tokens,
            stop_token_ids=stop_token_ids,
        ),
        max_context_tokens=sampling.max_context_tokens,
        max_retries=config.actors.max_rollout_retries,
    )
