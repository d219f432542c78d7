"""The plan of an update, without a model: what each rank computes of it."""

import random

import pytest

from tests.support.random_trees import random_tree
from trace_async.config import load_config
from trace_async.learner.batches import plan_update
from trace_async.trees.tree import RolloutTree


def trees_of(count: int) -> list[RolloutTree]:
    rng = random.Random(4)
    return [random_tree(rng, vocab=50) for _ in range(count)]


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_ranks_share_each_minibatch_out_and_pass_equally_often(num_ranks: int) -> None:
    # With `token` the weights of a minibatch sum to 1; a KL term lets every token of weight be computed.
    settings = ["learner.minibatches=2", "learner.max_tokens_per_micro_batch=100", "loss.aggregation=token"]
    config = load_config(None, [*settings, "loss.kl_loss_coef=0.1", "loss.advantage=grpo"])
    plans = [plan_update(config, trees_of(12), rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    for minibatch in zip(*plans, strict=True):
        assert len({(len(part.batches), part.num_pieces) for part in minibatch}) == 1
        weights = [sum(float(batch.entries.weight.sum()) for batch in part.batches) for part in minibatch]
        assert sum(weights) == pytest.approx(1.0)
        assert min(weights) > 0.6 / num_ranks


def test_a_rank_without_work_computes_a_piece_without_credit() -> None:
    config = load_config(None, ["loss.advantage=grpo", "loss.kl_loss_coef=0.1"])
    plans = [plan_update(config, trees_of(1), rank=rank, num_ranks=8)[0] for rank in range(8)]
    assert {len(plan.batches) for plan in plans} == {1}
    credited = [batch.has_credit for plan in plans for batch in plan.batches]
    assert 1 <= sum(credited) < 8
    idle = next(batch for plan in plans for batch in plan.batches if not batch.has_credit)
    assert idle.layout.num_tokens > 0
    assert float(idle.entries.weight.abs().sum()) == 0


def test_trees_whose_rollouts_all_end_alike_make_no_minibatch() -> None:
    tree = next(tree for tree in trees_of(60) if len({rollout.reward for rollout in tree.rollouts}) == 1)
    (plan,) = plan_update(load_config(None, ["loss.advantage=grpo"]), [tree], rank=0, num_ranks=2)
    assert (plan.batches, plan.num_pieces) == ((), 0)
