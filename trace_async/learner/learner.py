"""Take finished trees and make the policy one version newer, on one DeepSpeed rank.

    trees ─ minibatches of packed micro-batches (batches.py) ─ forward, loss, backward for each micro-batch (loss.py)
          ─ one optimizer step for each minibatch (deepspeed.py)

Every rank is given the same trees and makes the same plan. So ranks exchange gradients and metrics, but never data.
"""

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from trace_async.config import Config, LearnerConfig
from trace_async.learner.batches import Minibatch, plan_update
from trace_async.learner.deepspeed import (
    RankAddress,
    join_ranks,
    make_deepspeed,
    make_frozen,
    partitioned_loading,
    step_if_finite,
)
from trace_async.learner.loss import LossMetrics, LossTerms, entry_logprobs, policy_loss
from trace_async.learner.policy_tensors import add_lora, policy_buckets
from trace_async.learner.probe import check_packed_rows
from trace_async.packing.attention import AttentionKind, attention_for, hidden_states, prepare_model
from trace_async.packing.layout import PackedBatch
from trace_async.policy.device import resolve_device
from trace_async.policy.load import load_model
from trace_async.run.model_folder import logit_factor
from trace_async.trees.tree import RolloutTree
from trace_async.weights import WeightBucket, host_bucket

log = logging.getLogger(__name__)


class LearnerError(Exception):
    """Report that an update went wrong: no weight changed. Go on from the last checkpoint."""


class TokenLogprobs(nn.Module):
    """The policy as DeepSpeed sees it: from a packed batch to log-probabilities and entropies [E] of its entries.

    All that is called in training happens in this one `forward`, because DeepSpeed wraps the module and follows only
    that.
    """

    def __init__(self, policy: Any, kind: AttentionKind, *, temperature: float, chunk_tokens: int, entropy: bool):
        super().__init__()
        self.policy = policy
        self._kind = kind
        # A head that multiplies its logits by a factor is the head without it, at another temperature.
        self._temperature = temperature / logit_factor(policy.config.to_dict())
        self._chunk_tokens = chunk_tokens
        self._entropy = entropy

    def forward(self, batch: PackedBatch | torch.Tensor) -> Any:
        """Return log-probabilities and entropies of a packed batch.

        For a plain row of ids [1, T] it returns the model's own logits [T, vocab] by transformers' causal attention;
        the check at the start compares the two.
        """
        if isinstance(batch, torch.Tensor):
            self.policy.set_attn_implementation("eager")
            logits = self.policy(input_ids=batch, use_cache=False).logits[0]
            prepare_model(self.policy, self._kind)
            return logits
        hidden = hidden_states(self.policy, batch.layout, self._kind)
        return entry_logprobs(
            self.policy.get_output_embeddings(),
            hidden,
            batch.entries.rows,
            batch.entries.labels,
            temperature=self._temperature,
            chunk_tokens=self._chunk_tokens,
            with_entropy=self._entropy,
        )


class Learner:
    """Trains the policy as one of the ranks that meet at `address`, or as the only one.

    All ranks must make the same calls with the same arguments in the same order, because each call exchanges data
    with the other ranks. `num_steps` counts optimizer steps over all updates. `engine` is DeepSpeed's; learner/state.py
    reads and writes through it.
    """

    def __init__(self, config: Config, policy_path: Path, address: RankAddress | None = None) -> None:
        address = address or RankAddress()
        self.config = config
        self.policy_path = policy_path
        self.is_first = address.rank == 0
        self.num_steps = 0
        self.rank, self.world_size = address.rank, address.world_size
        self._device = resolve_device(config.learner.device, name="learner.device", rank=self.rank)
        if self._device.type == "cpu":
            torch.set_num_threads(config.learner.num_threads)
        join_ranks(address, self._device, config.learner.step_timeout_s)
        torch.manual_seed(config.seed)
        self._module = self._make_module(load_policy(config, policy_path), self._device, entropy=True)
        self._reference = self._make_reference()
        trained = [parameter for parameter in self._module.parameters() if parameter.requires_grad]
        adam = torch.optim.AdamW(
            trained,
            lr=config.learner.learning_rate,
            betas=(config.learner.adam_beta1, config.learner.adam_beta2),
            weight_decay=config.learner.weight_decay,
        )
        self.engine = make_deepspeed(self._module, adam, config.learner)
        self._check_packed_rows()

    @property
    def policy(self) -> Any:
        """The transformers model that is trained (its parameters may be partitioned)."""
        return self._module.policy

    def update(self, trees: Sequence[RolloutTree], policy_version: int) -> dict[str, float]:
        """Train the policy, which is at `policy_version`, on `trees`. Returns metrics over all ranks.

        Every rank is given all trees. The metric `updated` is 0 when no weight changed because no token has credit or
        all tokens with credit are clipped. A step whose loss or gradient is not finite is left out, weights and
        optimizer stay as they are, and `skipped_steps` counts it. Asserts `actors.max_staleness`. Raises LearnerError
        when no weight changed for another reason.
        """
        started = time.perf_counter()
        self._assert_fresh(trees, policy_version)
        # Dropout, where a model has it, follows from what a checkpoint holds, so that an update can be made again.
        draws = np.random.SeedSequence((self.config.seed, self.num_steps, self.rank))
        torch.manual_seed(int(draws.generate_state(1)[0]))
        planned = plan_update(self.config, trees, rank=self.rank, num_ranks=self.world_size)
        # All ranks drop the same ones, since the number of pieces is the same everywhere.
        minibatches = [minibatch.to(self._device) for minibatch in planned if minibatch.num_pieces]
        if not minibatches:
            return {"updated": 0.0, "seconds": time.perf_counter() - started}
        before = self._fingerprint()
        correcting = self.config.loss.correction != "none"
        # With one minibatch the policy of the step is the proximal policy, so no further pass is needed.
        proximal = [self._no_grad(self.engine, m) if correcting and len(minibatches) > 1 else None for m in minibatches]
        first, metrics = LossMetrics(), LossMetrics()
        grad_norms = []
        for index, (minibatch, anchors) in enumerate(zip(minibatches, proximal, strict=True)):
            grad_norms.append(
                self._step(minibatch, anchors, [metrics, first] if index == 0 else [metrics], policy_version)
            )
        result = self._reduced(metrics).result()
        # Report the mismatch of the first step alone: later steps would add the change by this update's own learning.
        start = self._reduced(first).result()
        result |= {name: start[name] for name in start if name.startswith("mismatch")}
        result["loss"] /= len(minibatches)
        changed = self._changed(before)
        skipped = sum(not math.isfinite(norm) for norm in grad_norms)
        if not changed and not skipped and result["clip_fraction"] < 1:
            raise LearnerError(f"update at version {policy_version}: no weight changed (grad norms {grad_norms})")
        unique = self._sum([batch.layout.num_tokens for m in minibatches for batch in m.batches if batch.has_credit])
        return result | {
            "updated": float(changed),
            "skipped_steps": float(skipped),
            "grad_norm": float(np.mean(grad_norms)),
            "learning_rate": self.engine.optimizer.param_groups[0]["lr"],
            "packed_tokens": unique,
            "optimizer_steps": float(self.num_steps),
            "seconds": time.perf_counter() - started,
        }

    def weights(self) -> Iterator[WeightBucket]:
        """Yield the policy's weights in buckets of `learner.weight_bucket_bytes`, by their Hugging Face names.

        LoRA is merged, and tied tensors appear once. With `engine.lora_rank` only the adapter is given, which the
        generators add themselves. Only rank 0 gets buckets, but the other ranks must iterate as well, because all of
        them gather each bucket. On the CPU a bucket shares memory with the parameters: be done with it before you ask
        for the next one.
        """
        adapter_only = bool(self.config.engine.lora_rank)
        for bucket in policy_buckets(self.policy, self.config.learner.weight_bucket_bytes, adapter_only=adapter_only):
            if self.is_first:
                yield host_bucket(bucket)
            del bucket  # otherwise it would live while the next one is gathered

    def _make_module(self, policy: Any, device: torch.device, *, entropy: bool) -> TokenLogprobs:
        learner = self.config.learner
        kind = attention_for(device, flat=learner.packing == "flat")
        prepare_model(policy, kind)
        return TokenLogprobs(
            policy.to(device),
            kind,
            temperature=self.config.sampling.temperature,
            chunk_tokens=learner.logprob_chunk_tokens,
            entropy=entropy,
        )

    def _check_packed_rows(self) -> None:
        """Check, before anything is trained, that this model computes a branched row as it computes its branches."""
        flat = self.config.learner.packing == "flat"
        self._module.eval()

        def own(row: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.engine(row.to(self._device))
            return logits

        def packed(batch: PackedBatch) -> torch.Tensor:
            logprobs: torch.Tensor = self.engine(batch.to(self._device))[0]
            return logprobs

        check_packed_rows(self.config, self.policy.config.vocab_size, packed, own, flat=flat)

    def _make_reference(self) -> Any:
        """Load the start policy, frozen, for the KL term; None when the loss has no such term.

        `learner.reference_device` may put it on a device of its own.
        """
        if not self.config.loss.kl_loss_coef:
            return None
        learner = self.config.learner
        self._reference_device = self._device
        if learner.reference_device != "auto":
            self._reference_device = resolve_device(
                learner.reference_device, name="learner.reference_device", rank=self.rank
            )
        partitioned = learner.reference_is_partitioned
        with partitioned_loading(learner) if partitioned else contextlib.nullcontext():
            policy = load_model(self.policy_path, dtype=learner.dtype)
        module = self._make_module(policy, self._reference_device, entropy=False).requires_grad_(False)
        return make_frozen(module, learner) if partitioned else module

    def _assert_fresh(self, trees: Sequence[RolloutTree], policy_version: int) -> None:
        for tree in trees:
            staleness = policy_version - tree.oldest_policy_version
            assert 0 <= staleness <= self.config.actors.max_staleness, (
                f"tree of task {tree.task.id}: staleness {staleness} is not within "
                f"0..actors.max_staleness={self.config.actors.max_staleness}"
            )

    def _step(
        self,
        minibatch: Minibatch,
        proximal: list[torch.Tensor] | None,
        counters: list[LossMetrics],
        policy_version: int,
    ) -> float:
        """Go backward through all micro-batches and take one optimizer step.

        Returns the gradient norm before clipping. When it is not finite, the step was left out.
        """
        loss_config = self.config.loss
        reference = self._reference_logprobs(minibatch)
        self._module.train()
        for index, batch in enumerate(minibatch.batches):
            logprobs, entropy = self.engine(batch)
            terms = LossTerms(
                learner_logprobs=logprobs,
                entropy=entropy,
                proximal_logprobs=proximal[index] if proximal else logprobs.detach(),
                reference_logprobs=reference[index] if reference else None,
            )
            loss, clipped = policy_loss(batch.entries, terms, loss_config)
            if not torch.isfinite(loss):
                log.error("update at version %d: the loss is %s; its step is left out", policy_version, loss.item())
                # Its gradient may be finite on this rank. All ranks must see that the sum is not.
                loss = loss * math.nan
            if batch.has_credit:
                for counter in counters:
                    counter.add(batch.entries, terms, loss, clipped, policy_version)
            # DeepSpeed averages gradients over the ranks. The entries are normalised over the whole minibatch already,
            # so their losses must be summed instead: multiplying by the number of ranks undoes the average.
            self.engine.backward(loss * self.world_size, scale_wrt_gas=False)
        # Set here and not by a scheduler of DeepSpeed, so that the step count of a checkpoint is all it depends on.
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        norm = step_if_finite(self.engine)
        if math.isfinite(norm):
            self.num_steps += 1
        else:
            log.error("update at version %d: a gradient is not finite; its step is left out", policy_version)
        return norm

    def _no_grad(self, model: Any, minibatch: Minibatch) -> list[torch.Tensor]:
        with torch.no_grad():
            return [model(batch)[0].detach() for batch in minibatch.batches]

    def _reference_logprobs(self, minibatch: Minibatch) -> list[torch.Tensor] | None:
        if self._reference is None:
            return None
        with torch.no_grad():
            batches = (batch.to(self._reference_device) for batch in minibatch.batches)
            return [self._reference(batch)[0].to(self._device) for batch in batches]

    def _learning_rate(self) -> float:
        learner = self.config.learner
        total = self.config.num_updates * learner.minibatches
        return learner.learning_rate * schedule(learner, self.num_steps, total)

    def _fingerprint(self) -> list[int]:
        """Return one hash per trained tensor, of the part that this rank holds.

        Comparing hashes shows whether an update changed anything without a copy of the weights.
        """
        held = [getattr(p, "ds_tensor", p).detach() for p in self._module.parameters() if p.requires_grad]
        # As signed numbers, because few torch operations take the unsigned ones that hash_tensor returns.
        hashes: list[int] = torch.stack([torch.hash_tensor(tensor).view(torch.int64) for tensor in held]).tolist()
        return hashes

    def _changed(self, before: list[int]) -> bool:
        return self._sum([float(self._fingerprint() != before)]) > 0

    def _sum(self, values: Sequence[float]) -> float:
        total = torch.tensor([sum(values)], dtype=torch.float64)
        return float(self._all_reduce(total, torch.distributed.ReduceOp.SUM))

    def _reduced(self, metrics: LossMetrics) -> LossMetrics:
        metrics.sums = self._all_reduce(metrics.sums, torch.distributed.ReduceOp.SUM)
        metrics.mismatch_max = self._all_reduce(metrics.mismatch_max, torch.distributed.ReduceOp.MAX)
        return metrics

    def _all_reduce(self, values: torch.Tensor, operation: Any) -> torch.Tensor:
        if self.world_size == 1:
            return values
        moved = values.to(self._device)
        torch.distributed.all_reduce(moved, op=operation)
        return moved.cpu()


def load_policy(config: Config, policy_path: Path) -> Any:
    """Load the policy to train, with LoRA adapters and activation checkpointing as set.

    It is on the host, or partitioned over the ranks under ZeRO-3.
    """
    transformers.utils.logging.disable_progress_bar()
    with partitioned_loading(config.learner):
        policy: Any = load_model(policy_path, dtype=config.learner.dtype)
    if config.learner.lora_rank:
        add_lora(policy, config.learner.lora_rank, seed=config.seed)
    if config.learner.gradient_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
        policy.enable_input_require_grads()
    return policy


def schedule(config: LearnerConfig, step: int, total_steps: int) -> float:
    """Return the factor on the learning rate at `step` (0, 1, …).

    After a linear warm-up it stays constant or falls to 0, linearly or by a cosine.
    """
    warmup = config.lr_warmup_updates * config.minibatches
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    if config.lr_schedule == "linear":
        return 1.0 - done
    if config.lr_schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1.0
