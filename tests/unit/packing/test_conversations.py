"""Rollouts that hold several conversations: the policy is trained on each turn with what it saw, and nothing else."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.random_trees import random_tree
from tests.unit.packing.test_packing import CPU, VOCAB, credit_of, gradients, make_model, packed
from trace_async.method.credit import compute_credit
from trace_async.packing.attention import hidden_states, prepare_model, visible
from trace_async.packing.layout import lay_out_tree, pack, pack_values, plan_micro_batches
from trace_async.predictor.predictor import backed_up_targets
from trace_async.trees.io import tree_from_json, tree_to_json
from trace_async.trees.tree import RolloutTree


def conversing_tree(seed: int, **shape) -> RolloutTree:
    return random_tree(random.Random(seed), vocab=VOCAB, conversations=0.5, **shape)


def seen_before(tree: RolloutTree, node: int) -> list[int]:
    """Brute force: the tokens in front of a turn, from the definition of `follows`."""
    tokens: list[int] = []
    at = tree.nodes[node].parent
    while at >= 0:
        tokens = [*tree.nodes[at].token_ids, *tokens]
        follows = tree.nodes[at].follows
        at = tree.nodes[at].parent if follows is None else follows
    return tokens


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_row_sees_exactly_what_the_policy_saw(seed: int):
    tree = conversing_tree(seed, max_turns=6)
    layout, first = lay_out_tree(tree, {n: len(node.token_ids) for n, node in enumerate(tree.nodes)})
    assert layout.num_tokens == tree.num_unique_tokens
    sees = visible(layout, CPU)
    for n, node in enumerate(tree.nodes):
        if node.num_generated:
            seen = sees[first[n]].nonzero()[:, 0]
            assert layout.token_ids[seen].tolist() == [*seen_before(tree, n), node.token_ids[0]]
            assert layout.positions[seen].tolist() == list(range(len(seen)))


def reference(model: torch.nn.Module, tree: RolloutTree, credit) -> torch.Tensor:
    """The gradient turn by turn: each with its own context, alone in the model."""
    prepare_model(model, "plain")
    model.zero_grad()
    for n, node in enumerate(tree.nodes):
        if not node.num_generated:
            continue
        context = seen_before(tree, n)
        ids = torch.tensor([[*context, *node.token_ids[: node.num_generated]]])
        logits = model(input_ids=ids).logits[0, len(context) - 1 : -1]
        labels = ids[0, len(context) :]
        logprobs = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
        ratio = (logprobs - torch.tensor(node.logprobs)).exp()
        (credit.positive[n] * ratio.clamp(max=1.2) + credit.negative[n] * ratio.clamp(min=0.8)).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("seed", range(6))
def test_the_gradient_equals_that_of_every_turn_with_its_own_context(seed: int):
    tree = conversing_tree(seed, max_turns=6, continuations=5)
    rng = random.Random(seed)
    chosen = [rng.choice([0, 1, -1]) * rng.random() if node.num_generated else 0.0 for node in tree.nodes]
    credit = credit_of(chosen)
    model = make_model("qwen3")
    expected = reference(model, tree, credit)
    assert expected.abs().max() > 1e-3
    for packing, kind, max_tokens in (
        ("flat", "plain", 10**6),
        ("tree", "grouped", 10**6),
        ("tree", "grouped", 24),
        ("tree", "dense", 10**6),
    ):
        pieces, _ = packed([tree], [credit], packing, max_tokens=max_tokens)
        if packing == "flat":
            batches = [pack([tree], [credit], [piece]) for piece in pieces]
        else:
            (parts,) = plan_micro_batches(pieces, num_ranks=1, max_tokens=max_tokens)
            batches = [pack([tree], [credit], part) for part in parts if part]
        found = gradients(model, kind, batches)
        assert (found - expected).abs().max() < 1e-6 * expected.abs().max(), (packing, kind, max_tokens)


def test_values_are_read_at_the_end_of_what_the_policy_saw():
    trees = [conversing_tree(seed) for seed in range(3)]
    model = make_model("qwen3")
    layout, ends = pack_values(trees)
    prepare_model(model, "grouped")
    hidden = hidden_states(model, layout, "grouped")
    prepare_model(model, "plain")
    for tree, rows in zip(trees, ends, strict=True):
        for node, row in enumerate(rows):
            alone = model.model(input_ids=torch.tensor([tree.prefix_tokens(node)])).last_hidden_state[0, -1]
            assert torch.allclose(hidden[row], alone, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_all_conversations_of_a_rollout_share_its_outcome(seed: int):
    """Credit and the predictor's targets are those of the same tree in which every turn follows the last."""
    tree = conversing_tree(seed)
    targets, weights = backed_up_targets(tree)
    for rollout, path in tree.branches():
        if not tree.children[tree.rollouts[rollout].leaf]:
            own = [node for node in tree.fresh_nodes(rollout) if tree.num_leaves[node] == 1]
            assert all(targets[node] == tree.rollouts[rollout].reward for node in own)
        assert all(weights[node] >= 1 for node in path)
    credit = compute_credit("trace", tree)
    for rollout in range(len(tree.rollouts)):
        turns = [node for node in tree.fresh_nodes(rollout) if tree.nodes[node].num_generated]
        context = [node for node in tree.fresh_nodes(rollout) if not tree.nodes[node].num_generated]
        assert len({(credit.positive[n], credit.negative[n]) for n in turns}) == 1
        assert not np.any(credit.weight[context])


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_tree_with_conversations_is_read_back_as_it_was_written(seed: int):
    tree = conversing_tree(seed)
    assert tree_from_json(tree_to_json(tree)) == tree
