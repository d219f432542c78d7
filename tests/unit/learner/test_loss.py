import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.support.random_trees import TASK
from trace_async.config import LossConfig
from trace_async.learner.loss import LossMetrics, LossTerms, entry_logprobs, kl_estimate, policy_loss
from trace_async.method.aggregation import Aggregation, normalize_credits
from trace_async.method.credit import NodeCredit
from trace_async.method.objective import Objective
from trace_async.packing.layout import Entries
from trace_async.trees.tree import Node, Rollout, RolloutTree
from trace_async.types import VersionSpan

torch.set_num_threads(1)
CLIP = LossConfig(eps_clip_low=0.2, eps_clip_high=0.3)
LOG2 = math.log(2)


def entries_of(generator, positive, negative, weight=None, versions=None) -> Entries:
    count = len(generator)
    floats = [torch.tensor(v, dtype=torch.float64) for v in (generator, positive, negative, weight or [1.0] * count)]
    zeros = torch.zeros(count, dtype=torch.int64)
    return Entries(
        rows=zeros,
        labels=zeros,
        policy_versions=torch.tensor(versions) if versions else zeros,
        generator_logprobs=floats[0],
        positive=floats[1],
        negative=floats[2],
        weight=floats[3],
    )


def evaluate(entries, ratios, config=CLIP, proximal=None, reference=None, entropy=None):
    """Loss, gradient with respect to the learner's log-probabilities, clipped; ratios are to the generator."""
    learner = (entries.generator_logprobs + torch.tensor(ratios, dtype=torch.float64).log()).requires_grad_()
    terms = LossTerms(
        learner_logprobs=learner,
        proximal_logprobs=None if proximal is None else torch.tensor(proximal, dtype=torch.float64),
        reference_logprobs=None if reference is None else torch.tensor(reference, dtype=torch.float64),
        entropy=None if entropy is None else torch.tensor(entropy, dtype=torch.float64),
    )
    loss, clipped = policy_loss(entries, terms, config)
    loss.backward()
    return loss.item(), learner.grad.tolist(), clipped.tolist()


def test_clipping_on_both_sides_and_both_signs():
    # Positive credit: capped at 1.3. Negative: its ratio counts at least 0.8.
    entries = entries_of([-1.0] * 6, [2, 2, 2, 0, 0, 0], [0, 0, 0, -1, -1, -1])
    loss, gradient, clipped = evaluate(entries, [0.5, 1.0, 2.0, 0.5, 1.0, 2.0])
    assert loss == pytest.approx(-(2 * 0.5 + 2 * 1 + 2 * 1.3 - 0.8 - 1 - 2))
    assert gradient == pytest.approx([-1.0, -2.0, 0.0, 0.0, 1.0, 2.0])
    assert clipped == [False, False, True, True, False, False]


def test_dual_clip_bounds_a_likely_token_of_negative_credit():
    entries = entries_of([-1.0, -1.0], [0, 0], [-1, -1])
    loss, gradient, clipped = evaluate(entries, [2.0, 8.0], replace(CLIP, dual_clip=3.0))
    assert loss == pytest.approx(2 + 3)
    assert gradient == pytest.approx([2.0, 0.0])
    assert clipped == [False, True]


def test_cispo_clips_the_weight_and_keeps_the_gradient():
    # log π = −1 + log ρ; weights .5, 1, 1.3; credits 2, 2, 2 and −1
    entries = entries_of([-1.0] * 4, [2, 2, 2, 0], [0, 0, 0, -1])
    loss, gradient, clipped = evaluate(entries, [0.5, 1.0, 2.0, 2.0], replace(CLIP, objective="cispo"))
    assert gradient == pytest.approx([-1.0, -2.0, -2.6, 1.3])
    assert loss == pytest.approx(-(2 * 0.5 * (-1 - LOG2) + 2 * -1 + (2 - 1) * 1.3 * (-1 + LOG2)))
    assert clipped == [False, False, True, True]


def test_tokens_out_of_the_mask_learn_nothing_and_count_as_clipped():
    entries = entries_of([-3.0] * 4, [1, 1, 0, 0], [0, 0, -1, -1])
    config = replace(CLIP, mask_low=0.5, mask_high=5.0)
    loss, gradient, clipped = evaluate(entries, [0.4, 0.6, 4.0, 6.0], config)
    assert gradient == pytest.approx([0, -0.6, 4.0, 0])
    assert loss == pytest.approx(-0.6 + 4.0)
    assert clipped == [True, False, False, True]
    assert evaluate(entries, [0.4, 0.6, 4.0, 6.0], replace(CLIP, mask_low=0.5))[1] == pytest.approx([0, -0.6, 4, 6])


@settings(max_examples=100, deadline=None)
@given(
    terms=st.lists(st.tuples(st.floats(0.05, 2), st.floats(-2, 2)), min_size=1, max_size=6),
    ratio=st.floats(0.3, 5),
    dual_clip=st.sampled_from([0.0, 3.0]),
)
def test_many_terms_on_one_token_collapse_exactly(terms, ratio, dual_clip):
    config = replace(CLIP, dual_clip=dual_clip)
    apart = entries_of([-1.0] * len(terms), [w * max(a, 0) for w, a in terms], [w * min(a, 0) for w, a in terms])
    together = entries_of([-1.0], [apart.positive.sum().item()], [apart.negative.sum().item()])
    loss_apart, gradient_apart, _ = evaluate(apart, [ratio] * len(terms), config)
    loss, gradient, _ = evaluate(together, [ratio], config)
    assert loss == pytest.approx(loss_apart, abs=1e-9)
    assert gradient[0] == pytest.approx(sum(gradient_apart), abs=1e-9)


def test_decoupled_clips_around_the_proximal_policy_and_weighs_by_it():
    # generator p = 1/8, proximal 1/2, learner 3/4: importance 4, ratio 1.5 clipped at 1.3.
    entries = entries_of([-3 * LOG2], [1.0], [0.0])
    config = replace(CLIP, correction="decoupled")
    assert evaluate(entries, [6.0], config, proximal=[-LOG2])[0] == pytest.approx(-4 * 1.3)
    entries = entries_of([-3 * LOG2], [0.0], [-1.0])
    loss, gradient, _ = evaluate(entries, [6.0], config, proximal=[-LOG2])
    assert loss == pytest.approx(4 * 1.5)
    assert gradient == pytest.approx([6.0])


def test_tis_truncates_the_importance_weight():
    entries = entries_of([-3 * LOG2, -LOG2], [1.0, 1.0], [0.0, 0.0])
    config = replace(CLIP, correction="tis", tis_cap=2.0)
    # First: importance 4 → 2, ratio 1.25. Second: importance 1/2, ratio 1.
    loss, gradient, _ = evaluate(entries, [5.0, 0.5], config, proximal=[-LOG2, -2 * LOG2])
    assert loss == pytest.approx(-(2 * 1.25 + 0.5 * 1))
    assert gradient == pytest.approx([-2.5, -0.5])


@pytest.mark.parametrize(
    ("estimator", "value", "slope"), [("k1", LOG2, 1.0), ("k2", LOG2**2 / 2, LOG2), ("k3", 0.5 - 1 + LOG2, 0.5)]
)
def test_kl_estimators(estimator, value, slope):
    # learner twice as likely as the reference: d = log 2.
    config = replace(CLIP, kl_loss_coef=0.1, kl_estimator=estimator)
    entries = entries_of([-1.0], [0.0], [0.0], weight=[3.0])
    loss, gradient, _ = evaluate(entries, [1.0], config, reference=[-1.0 - LOG2])
    assert loss == pytest.approx(0.1 * 3 * value)
    assert gradient == pytest.approx([0.1 * 3 * slope])


def test_kl_gradients_are_those_the_docstring_claims():
    reference = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    logits = torch.tensor([0.1, -0.4, 0.7], dtype=torch.float64, requires_grad=True)

    def gradient(loss):
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    learner = logits.log_softmax(-1)
    sampled = learner.exp().detach()
    exact = (learner.exp() * (learner - reference)).sum()
    swapped = (reference.exp() * (reference - learner)).sum()
    expected: dict[Any, torch.Tensor] = {
        "k1": torch.zeros(3, dtype=torch.float64),
        "k2": gradient(exact),
        "k3": gradient(swapped),
    }
    for name, wanted in expected.items():
        estimate = kl_estimate(learner, reference, replace(CLIP, kl_estimator=name))
        assert torch.allclose(gradient((sampled * estimate).sum()), wanted, atol=1e-12), name


def test_entropy_bonus_is_weighted():
    config = replace(CLIP, entropy_coef=0.01)
    assert evaluate(entries_of([-1.0], [0], [0], weight=[2.0]), [1.0], config, entropy=[1.5])[0] == pytest.approx(-0.03)


def two_trees() -> list[RolloutTree]:
    """Tree A: root rollouts of 1 + 3 and 2 generated tokens. Tree B: one of 5."""

    def chain(lengths_by_rollout):
        nodes = [Node(parent=-1, rollout=-1, token_ids=(1, 2), num_generated=0)]
        rollouts = []
        for r, lengths in enumerate(lengths_by_rollout):
            parent = 0
            for length in lengths:
                nodes.append(
                    Node(
                        parent=parent,
                        rollout=r,
                        token_ids=(3,) * (length + 1),
                        num_generated=length,
                        logprobs=(-1.0,) * length,
                        version_spans=(VersionSpan(0, 0),),
                    )
                )
                parent = len(nodes) - 1
            rollouts.append(Rollout(kind="root", anchor=0, leaf=parent, reward=1.0))
        return RolloutTree(task=TASK, nodes=tuple(nodes), rollouts=tuple(rollouts))

    return [chain([[1, 3], [2]]), chain([[5]])]


def test_aggregations_by_hand():
    trees = two_trees()
    weights = [np.array([0, 2.0, 2.0, 1.0]), np.array([0, 4.0])]
    credits = [NodeCredit(positive=3 * w, negative=-w, weight=w) for w in weights]
    # token: Σ w = (1 + 3)·2 + 2·1 + 5·4 = 30.
    a, b = normalize_credits(trees, credits, "token")
    assert a.weight.tolist() == pytest.approx([0, 2 / 30, 2 / 30, 1 / 30])
    assert b.positive.tolist() == pytest.approx([0, 12 / 30])
    # sequence: means of the rollouts' weights 2, 1, 4 sum to 7; a token gets w / n_r / 7.
    a, b = normalize_credits(trees, credits, "sequence")
    assert a.weight.tolist() == pytest.approx([0, 2 / 4 / 7, 2 / 4 / 7, 1 / 2 / 7])
    assert b.negative.tolist() == pytest.approx([0, -4 / 5 / 7])
    # prompt: two trees; divisors 10 and 20.
    a, b = normalize_credits(trees, credits, "prompt")
    assert a.weight.tolist() == pytest.approx([0, 2 / 20, 2 / 20, 1 / 20])
    assert b.weight.tolist() == pytest.approx([0, 4 / 40])


@pytest.mark.parametrize("aggregation", ["token", "sequence", "prompt"])
def test_aggregations_are_weighted_means(aggregation):
    trees = two_trees()
    credits = [
        NodeCredit(positive=w, negative=0 * w, weight=w) for w in (np.array([0, 2.0, 2.0, 1.0]), np.array([0, 4.0]))
    ]
    scaled = [NodeCredit(positive=9 * c.positive, negative=9 * c.negative, weight=9 * c.weight) for c in credits]
    plain, large = (normalize_credits(trees, c, aggregation) for c in (credits, scaled))
    total = 0.0
    for tree, one, other in zip(trees, plain, large, strict=True):
        assert one.positive.tolist() == pytest.approx(other.positive.tolist())
        total += sum(w * node.num_generated for w, node in zip(one.weight, tree.nodes, strict=True))
    assert total == pytest.approx(1.0)


def test_a_tree_without_weight_counts_nowhere():
    trees = two_trees()
    credits = [NodeCredit(positive=w, negative=0 * w, weight=w) for w in (np.array([0, 2.0, 2.0, 1.0]), np.zeros(2))]
    for aggregation in ("token", "sequence", "prompt"):
        a, b = normalize_credits(trees, credits, aggregation)
        assert b.weight.tolist() == [0, 0]
        assert np.isfinite(a.weight).all()
    assert normalize_credits(trees, credits, "prompt")[0].weight.tolist() == pytest.approx([0, 0.2, 0.2, 0.1])


class Reinforce(Objective):
    """No ratio at all."""

    def gain(self, ratio, learner_logprobs, positive, negative):
        return (positive + negative) * learner_logprobs, torch.zeros_like(ratio, dtype=torch.bool)


class ByNumberOfTrees(Aggregation):
    def divisors(self, totals):
        return np.full(len(totals), float(len(totals)))


def test_an_objective_and_an_aggregation_of_ones_own_are_named_in_the_settings_and_used():
    config = LossConfig(objective=f"{__name__}:Reinforce", aggregation=f"{__name__}:ByNumberOfTrees")
    loss, gradient, clipped = evaluate(entries_of([-1.0, -1.0], [2, 0], [0, -3]), [math.e, 1.0], config)
    assert loss == pytest.approx(-(2 * 0.0 + -3 * -1.0))  # log-probabilities −1 + 1 and −1
    assert gradient == pytest.approx([-2, 3])
    assert clipped == [False, False]
    credits = [NodeCredit(positive=w, negative=0 * w, weight=w) for w in (np.array([0, 2.0, 2.0, 1.0]), np.zeros(2))]
    a, b = normalize_credits(two_trees(), credits, config.aggregation)
    assert (a.weight.tolist(), b.weight.tolist()) == ([0, 1, 1, 0.5], [0, 0])


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunked_logprobs_equal_plain_ones_with_gradients(chunk):
    torch.manual_seed(0)
    head = nn.Linear(8, 11, bias=False).double()
    hidden = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    rows, labels = torch.tensor([0, 0, 5, 2, 2, 2, 1]), torch.tensor([1, 7, 3, 0, 10, 4, 4])
    logprobs, entropy = entry_logprobs(
        head, hidden, rows, labels, temperature=0.7, chunk_tokens=chunk, with_entropy=True
    )
    distribution = torch.distributions.Categorical(logits=head(hidden[rows]) / 0.7)
    assert torch.allclose(logprobs, distribution.log_prob(labels))
    assert torch.allclose(entropy, distribution.entropy())
    weights = torch.linspace(-1, 1, 7, dtype=torch.float64)
    found = torch.autograd.grad((logprobs * weights + entropy).sum(), [hidden, head.weight])
    wanted = torch.autograd.grad(
        (distribution.log_prob(labels) * weights + distribution.entropy()).sum(), [hidden, head.weight]
    )
    assert all(torch.allclose(f, w) for f, w in zip(found, wanted, strict=True))


def test_chunks_bound_the_logits_that_are_alive():
    sizes: list[int] = []

    class Head(nn.Linear):
        def forward(self, states):
            sizes.append(len(states))
            return super().forward(states)

    head = Head(4, 16)
    hidden = torch.randn(10, 4, requires_grad=True)
    rows = labels = torch.arange(10)
    logprobs, _ = entry_logprobs(head, hidden, rows, labels, temperature=1.0, chunk_tokens=4)
    logprobs.sum().backward()
    # Ten are rounded up to sixteen; each chunk is computed forward, and again in the backward pass.
    assert sizes == [4] * 8


def test_metrics_by_hand():
    entries = entries_of([-1.0, -1.0], [1.0, 1.0], [0.0, 0.0], versions=[3, 5])
    learner = torch.tensor([-1.0 + LOG2, -1.0 - LOG2], dtype=torch.float64)
    terms = LossTerms(learner_logprobs=learner, entropy=torch.tensor([0.5, 1.5]), reference_logprobs=learner - LOG2)
    loss, clipped = policy_loss(entries, terms, CLIP)
    metrics = LossMetrics()
    metrics.add(entries, terms, loss, clipped, policy_version=6)
    result = metrics.result()
    assert result["loss"] == pytest.approx(-1.8)
    assert result["trained_tokens"] == 2
    assert result["ratio_mean"] == pytest.approx(1.25)
    assert result["clip_fraction"] == 0.5
    assert result["entropy"] == 1.0
    assert result["mismatch"] == pytest.approx(LOG2)
    assert result["mismatch_max"] == pytest.approx(LOG2)
    assert result["mismatch_kl"] == pytest.approx(((2 - 1 - LOG2) + (0.5 - 1 + LOG2)) / 2)
    assert result["kl_reference"] == pytest.approx(0.5 - 1 + LOG2)
    assert result["staleness_mean"] == 2.0
