"""Plan an update: from finished trees to the packed micro-batches that one rank computes. Pure, and on the host.

    trees ─ credit ─ dealt out to minibatches ─ normalised ─ pieces ─ micro-batches, balanced over the ranks

Every rank is given the same trees and plans the same for all ranks, so nothing has to be agreed upon.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from trace_async.config import Config
from trace_async.method.aggregation import normalize_credits
from trace_async.method.credit import NodeCredit, compute_credits
from trace_async.packing.layout import PackedBatch, Piece, pack, pieces_of, plan_micro_batches
from trace_async.trees.tree import RolloutTree


@dataclass(frozen=True, slots=True, kw_only=True)
class Minibatch:
    """What one optimizer step trains on, on this rank."""

    batches: tuple[PackedBatch, ...]
    """Micro-batches; as many on every rank."""
    num_pieces: int
    """Pieces on all ranks together; 0 when nothing carries credit."""

    def to(self, device: torch.device) -> "Minibatch":
        """Return it with its tensors on the device."""
        return replace(self, batches=tuple(batch.to(device) for batch in self.batches))


def plan_update(config: Config, trees: Sequence[RolloutTree], *, rank: int, num_ranks: int) -> list[Minibatch]:
    """Return the minibatches of an update, at most `learner.minibatches`, as `rank` of `num_ranks` computes them."""
    loss = config.loss
    credits = compute_credits(loss.advantage, trees, normalize_std=loss.normalize_std)
    parts = _dealt_out(trees, config.learner.minibatches)
    return [_plan(config, [trees[i] for i in part], [credits[i] for i in part], rank, num_ranks) for part in parts]


def _dealt_out(trees: Sequence[RolloutTree], parts: int) -> list[list[int]]:
    """Deal the trees out to minibatches, largest first, so that all have similar numbers of tokens.

    Returns the indices of the trees per minibatch.
    """
    order = sorted(range(len(trees)), key=lambda i: (-trees[i].num_unique_tokens, i))
    return [order[part::parts] for part in range(min(parts, len(trees)))]


def _plan(
    config: Config, trees: Sequence[RolloutTree], credits: Sequence[NodeCredit], rank: int, num_ranks: int
) -> Minibatch:
    loss, learner = config.loss, config.learner
    credits = normalize_credits(trees, credits, loss.aggregation, divisor_tokens=loss.divisor_tokens)
    pieces = [
        piece
        for index, (tree, credit) in enumerate(zip(trees, credits, strict=True))
        for piece in pieces_of(
            index,
            tree,
            credit,
            packing=learner.packing,
            max_tokens=learner.max_tokens_per_micro_batch,
            every_weight=bool(loss.kl_loss_coef or loss.entropy_coef),
        )
    ]
    if not pieces:
        return Minibatch(batches=(), num_pieces=0)
    ranks = plan_micro_batches(pieces, num_ranks=num_ranks, max_tokens=learner.max_tokens_per_micro_batch)
    batches = tuple(_packed(trees, credits, part, pieces) for part in ranks[rank])
    return Minibatch(batches=batches, num_pieces=len(pieces))


def _packed(
    trees: Sequence[RolloutTree], credits: Sequence[NodeCredit], part: list[Piece], pieces: list[Piece]
) -> PackedBatch:
    if part:
        return pack(trees, credits, part)
    # All ranks must pass through the model equally often, so an empty batch computes a small piece without credit.
    smallest = min(pieces, key=lambda piece: piece.num_tokens)
    return pack(trees, credits, [smallest]).without_credit()
