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
        """Return the same at another temperature, for rollouts that nobody trains on.

        At 0 (greedy) top-p and top-k say nothing and are off.
        """
        sampling = replace(self.sampling, temperature=temperature, read_layers=None)
        return replace(self, sampling=sampling if temperature > 0 else replace(sampling, top_p=1.0, top_k=0))


def rollout_limits(config: Config, stop_token_ids: tuple[int, ...]) -> RolloutLimits:
    """Return what the config says of a rollout in training."""
    sampling, predictor = config.sampling, config.predictor
    return RolloutLimits(
        sampling=SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_new_tokens=sampling.max_turn_tokens,
            stop_token_ids=stop_token_ids,
            read_layers=predictor.layers_of_prefixes if config.predictor_trunk == "policy" else None,
            read_tokens=predictor.pooled_tokens,
        ),
        max_context_tokens=sampling.max_context_tokens,
        max_retries=config.actors.max_rollout_retries,
    )
