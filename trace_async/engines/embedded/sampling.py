"""Sample tokens for a whole batch at once."""

import hashlib

import numpy as np
import torch
from torch import Tensor

# So far below 1 that, scaled by a sum of probabilities and rounded, it still stays below that sum.
LARGEST_UNIFORM = 1 - 2**-50


def stream_key(*parts: int) -> int:
    """Return the name of a stream of random numbers (64 bits)."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest())


def uniforms(key_B: np.ndarray, index_B: np.ndarray) -> np.ndarray:
    """Return number `index` in [0, 1) of each stream, by splitmix64 (Steele, Lea and Flood, OOPSLA 2014).

    Keys are uint64. This is a function of key and index and no generator with state, so that a step can draw for all
    its requests at once.
    """
    z = key_B + (index_B.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return np.minimum((z >> np.uint64(11)).astype(np.float64) * 2.0**-53, LARGEST_UNIFORM)


def sample_tokens(
    logits_BV: Tensor, temperature_B: Tensor, uniform_B: Tensor, top_p_B: Tensor | None, top_k_B: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return tokens [B] and their log-probabilities [B] under softmax(logits / temperature), before top-p and top-k.

    Temperature 0 takes the most likely token, whose log-probability is that at temperature 1. `uniform_B` in [0, 1)
    picks the token by inverting the cumulative distribution, so the tokens of a request depend only on its own numbers.
    `top_p_B` and `top_k_B` (0: off) are None when no request uses them.
    """
    greedy_B = temperature_B == 0
    logprobs_BV = torch.log_softmax(logits_BV / torch.where(greedy_B, 1.0, temperature_B)[:, None], dim=-1)
    probs_BV = logprobs_BV.exp()
    if top_p_B is not None and top_k_B is not None:
        probs_BV = _keep_top(probs_BV, top_p_B, top_k_B)
    # In float64, because with a large vocabulary the rounding of a float32 sum would move the borders between tokens.
    cumulative_BV = probs_BV.cumsum(dim=-1, dtype=torch.float64)
    threshold_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
    sampled_B = torch.searchsorted(cumulative_BV, threshold_B1, right=True)[:, 0]
    token_B = torch.where(greedy_B, logits_BV.argmax(dim=-1), sampled_B)
    return token_B, logprobs_BV.gather(1, token_B[:, None])[:, 0]


def _keep_top(probs_BV: Tensor, top_p_B: Tensor, top_k_B: Tensor) -> Tensor:
    """Zero all but the `top_k` most likely tokens, and of these all but the fewest that hold the mass `top_p`."""
    sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
    rank_V = torch.arange(probs_BV.shape[1], device=probs_BV.device)
    beyond_k = (top_k_B[:, None] > 0) & (rank_V >= top_k_B[:, None])
    sorted_BV = sorted_BV.masked_fill(beyond_k, 0.0)
    # The nucleus is taken of what top-k has left, as in transformers, SGLang and vLLM.
    mass_before = sorted_BV.cumsum(dim=-1) - sorted_BV
    beyond_p = mass_before >= top_p_B[:, None] * sorted_BV.sum(dim=-1, keepdim=True)
    # With top_p = 1 rounding must not cut the tail, and the most likely token always stays.
    beyond_p &= (top_p_B[:, None] < 1) & (rank_V > 0)
    return torch.zeros_like(probs_BV).scatter(1, order_BV, sorted_BV.masked_fill(beyond_p, 0.0))
