"""Compute the policy-gradient loss over packed entries, and log-probabilities in bounded memory.

A token shared by several branches may carry terms of both signs. PPO's clipped objective is linear in the advantage
for each sign, so Σ_k w_k·f(ρ, A_k) = f(ρ, Σ w_k max(A_k, 0)) + f(ρ, Σ w_k min(A_k, 0)). So the two sums `positive`
and `negative` of an entry are enough, and the result is exact.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from trace_async.config import LossConfig
from trace_async.method.registry import objective_rule
from trace_async.packing.layout import Entries, round_rows

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to ± this, so that loss and gradient stay finite: e^20 ≈ 5e8, while e^89 overflows fp32."""


def bounded_ratio(log_ratio: torch.Tensor) -> torch.Tensor:
    """Return exp(log_ratio) with the exponent clamped to ±MAX_LOG_RATIO.

    No gradient passes through a clamped token, and `LossMetrics` counts it. Without the clamp, a log-probability of −2
    for the learner and −92 for the generator would give inf, and inf times a credit of 0 is NaN. An infinite exponent
    stays infinite: an engine that sampled a token it calls impossible is broken, and that must show.
    """
    bounded = log_ratio.clamp(min=-MAX_LOG_RATIO, max=MAX_LOG_RATIO)
    return torch.where(log_ratio.isinf(), log_ratio, bounded).exp()


def entry_logprobs(
    head: nn.Module,
    hidden: torch.Tensor,
    rows: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float,
    chunk_tokens: int,
    with_entropy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probabilities [E] of `labels` and entropies [E] (zeros unless asked for), at the sampling temperature.

    Both are fp32. `hidden` [N, hidden] is read at `rows` [E]. Logits are by far the largest tensor, so they exist for
    `chunk_tokens` entries at a time only. That holds in the backward pass too, where each chunk is computed again.
    """

    def one_chunk(states: torch.Tensor, chunk_labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = head(states)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        logits = logits / temperature
        log_normalizer = logits.logsumexp(dim=-1)
        chosen = logits.gather(-1, chunk_labels[:, None])[:, 0] - log_normalizer
        if not with_entropy:
            return chosen, torch.zeros_like(chosen)
        probabilities = (logits - log_normalizer[:, None]).exp()
        return chosen, log_normalizer - (probabilities * logits).sum(dim=-1)

    count = len(rows)
    filler = (0, round_rows(count) - count)  # few distinct sizes, for kernels that keep something for each (cpu_linear)
    states = hidden.index_select(0, nn.functional.pad(rows, filler)).split(chunk_tokens)
    chunks = list(zip(states, nn.functional.pad(labels, filler).split(chunk_tokens), strict=True))
    if len(chunks) == 1:
        parts = [one_chunk(*chunks[0])]
    else:
        parts = [checkpoint(one_chunk, *chunk, use_reentrant=False) for chunk in chunks]
    return torch.cat([part[0] for part in parts])[:count], torch.cat([part[1] for part in parts])[:count]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerms:
    """What the loss needs besides the entries. All tensors are [E]; None means that the term is not used."""

    learner_logprobs: torch.Tensor
    """By the policy that is trained, with its gradient."""
    entropy: torch.Tensor | None = None
    proximal_logprobs: torch.Tensor | None = None
    """By the policy at the start of the update, for a correction."""
    reference_logprobs: torch.Tensor | None = None
    """By the policy that the KL term keeps the learner close to."""


def policy_loss(entries: Entries, terms: LossTerms, config: LossConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed loss (a scalar) and which entries [E] were clipped.

    The entries must be normalised already (`normalize_credits`).

    Per entry, with ρ = exp(learner − anchor), the credit sums P ≥ 0 and N ≤ 0 and the gain G of `loss.objective`
    (`trace_async.method.objective`):

        −c · G(ρ, P, N)  + w · (kl_coef · KL − entropy_coef · H)

    - `mask_low`, `mask_high` (IcePop, of Ling's Ring-1T report; MIS): tokens with learner / generator out of these
      bounds count as clipped.
    - correction `none`: the anchor is the generator, c = 1. `decoupled` (AReaL, arXiv 2505.24298, eq. 5): the anchor
      is the proximal policy, c = exp(proximal − generator). `tis` (truncated importance sampling, IMPALA's ρ̄,
      arXiv 1802.01561; for engine mismatch Yao et al. 2025): the same with c ≤ `tis_cap`.
    - KL to the reference (Schulman, "Approximating KL divergence", 2020), d = learner − reference: k1 = d,
      k2 = d²/2, k3 = exp(−d) − 1 + d. Differentiated on samples of the policy, k2 has the gradient of
      KL(learner ‖ reference), k3 that of KL(reference ‖ learner), and k1's is zero on average.
    """
    learner = terms.learner_logprobs
    anchor = entries.generator_logprobs
    importance: torch.Tensor | float = 1.0
    if config.correction != "none":
        assert terms.proximal_logprobs is not None
        anchor = terms.proximal_logprobs.detach()
        importance = bounded_ratio(anchor - entries.generator_logprobs)
        if config.correction == "tis":
            importance = importance.clamp(max=config.tis_cap)
    ratio = bounded_ratio(learner - anchor)
    gain, clipped = objective_rule(config).gain(ratio, learner, entries.positive, entries.negative)
    if config.mask_low or config.mask_high:
        # The mask looks at the whole gap to the generator, whatever the anchor is. A token outside the bounds gets no
        # gradient of either sign.
        gap = bounded_ratio((learner - entries.generator_logprobs).detach())
        inside = (gap >= config.mask_low) & ((gap <= config.mask_high) if config.mask_high else True)
        gain, clipped = torch.where(inside, gain, 0.0), clipped | ~inside
    loss = -(importance * gain).sum()
    if config.kl_loss_coef:
        assert terms.reference_logprobs is not None
        loss = (
            loss + config.kl_loss_coef * (entries.weight * kl_estimate(learner, terms.reference_logprobs, config)).sum()
        )
    if config.entropy_coef:
        assert terms.entropy is not None
        loss = loss - config.entropy_coef * (entries.weight * terms.entropy).sum()
    return loss, clipped


def kl_estimate(learner: torch.Tensor, reference: torch.Tensor, config: LossConfig) -> torch.Tensor:
    """Estimate KL(learner ‖ reference) per token [E] by `config.kl_estimator` (see `policy_loss`)."""
    difference = learner - reference.detach()
    if config.kl_estimator == "k1":
        return difference
    if config.kl_estimator == "k2":
        return difference.square() / 2
    return bounded_ratio(-difference) - 1 + difference


class LossMetrics:
    """Collect sums over entries. The ranks add theirs up before they become averages over all trained tokens."""

    SUMS = ("tokens", "ratio", "clipped", "entropy", "kl", "mismatch", "mismatch_kl", "extreme", "staleness", "loss")

    def __init__(self) -> None:
        self.sums = torch.zeros(len(self.SUMS), dtype=torch.float64)
        self.mismatch_max = torch.zeros(1, dtype=torch.float64)

    @torch.no_grad()
    def add(
        self, entries: Entries, terms: LossTerms, loss: torch.Tensor, clipped: torch.Tensor, policy_version: int
    ) -> None:
        """Count one micro-batch. The mismatch is the learner's minus the generator's log-probability of a token."""
        gap = (terms.learner_logprobs - entries.generator_logprobs).double()
        ratio = bounded_ratio(gap)
        values = {
            "tokens": torch.ones_like(gap),
            "ratio": ratio,
            "clipped": clipped,
            "entropy": terms.entropy if terms.entropy is not None else torch.zeros_like(gap),
            "kl": torch.zeros_like(gap),
            "mismatch": gap.abs(),
            "mismatch_kl": ratio - 1 - gap,
            "extreme": gap.abs() > MAX_LOG_RATIO,
            "staleness": policy_version - entries.policy_versions,
        }
        if terms.reference_logprobs is not None:
            difference = (terms.learner_logprobs - terms.reference_logprobs).double()
            values["kl"] = bounded_ratio(-difference) - 1 + difference
        sums = [values[name].double().sum() for name in self.SUMS[:-1]]
        self.sums += torch.stack([*sums, loss.double()]).cpu()
        if entries.count:
            self.mismatch_max = torch.maximum(self.mismatch_max, gap.abs().max().cpu())

    def result(self) -> dict[str, float]:
        """Return the metrics by name; all but `loss`, `trained_tokens`, `mismatch_max` and `extreme_ratios` are means.

        `mismatch_kl` estimates KL(generator ‖ learner) by k3 on the generator's samples. `extreme_ratios` counts the
        tokens whose log-ratio was beyond ±MAX_LOG_RATIO.
        """
        sums = dict(zip(self.SUMS, self.sums.tolist(), strict=True))
        tokens = max(sums["tokens"], 1.0)
        return {
            "loss": sums["loss"],
            "trained_tokens": sums["tokens"],
            "ratio_mean": sums["ratio"] / tokens,
            "clip_fraction": sums["clipped"] / tokens,
            "entropy": sums["entropy"] / tokens,
            "kl_reference": sums["kl"] / tokens,
            "mismatch": sums["mismatch"] / tokens,
            "mismatch_kl": sums["mismatch_kl"] / tokens,
            "mismatch_max": float(self.mismatch_max),
            "extreme_ratios": sums["extreme"],
            "staleness_mean": sums["staleness"] / tokens,
        }
