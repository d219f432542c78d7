"""Allocation against exhaustive dynamic programming, and literal numbers worked out by hand."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trace_async.config import BudgetConfig
from trace_async.method.allocation import (
    allocate_prefixes,
    allocate_prefixes_by_tokens,
    allocate_prefixes_by_value,
    allocate_roots,
    allocate_roots_at_price,
    prefix_value,
    root_value,
)
from trace_async.method.anchors import Anchor, find_anchors
from trace_async.method.posterior import Estimates
from trace_async.method.registry import stage1_rule, stage2_rule
from trace_async.trees.tree import Node, Rollout, RolloutTree
from trace_async.types import Task, VersionSpan

probability = st.one_of(st.sampled_from([0.0, 0.05, 0.1, 0.25, 0.3, 0.5, 0.7, 0.9, 1.0]), st.floats(0, 1))


def plan_roots(config, beliefs, rng):
    return stage1_rule(config).plan(beliefs, config.root_rollouts, rng)


def best_total(values, units, low, high):
    """Exhaustive dynamic programming: the largest Σ values[i][m_i] with Σ m_i = units, low ≤ m_i ≤ high."""
    best = np.full(units + 1, -np.inf)
    best[0] = 0.0
    for row in values:
        with_row = np.full(units + 1, -np.inf)
        for m in range(low, min(high, units) + 1):
            with_row[m:] = np.maximum(with_row[m:], best[: units + 1 - m] + row[m])
        best = with_row
    return best[units]


def check_optimal(counts, values, budget, low, high):
    high = budget if high is None else high
    units = min(budget, len(values) * high)
    assert counts.sum() == units
    assert counts.dtype.kind == "i"
    assert ((counts >= low) & (counts <= high)).all()
    total = sum(row[m] for row, m in zip(values, counts, strict=True))
    assert total == pytest.approx(best_total(values, units, low, high), abs=1e-12)


@given(
    success=st.lists(probability, min_size=1, max_size=6),
    budget=st.integers(0, 15),
    low=st.sampled_from([0, 0, 0, 1, 2, 3]),
    spare=st.one_of(st.none(), st.integers(0, 6)),
    strength=st.one_of(st.none(), st.sampled_from([0.1, 1.0, 4.0, 100.0])),
)
@settings(max_examples=800, deadline=None)
@example(success=[0.4, 0.3, 0.2], budget=7, low=0, spare=None, strength=None)
@example(success=[0.5, 0.5], budget=5, low=0, spare=2, strength=None)
@example(success=[0.0, 1.0, 1.0], budget=4, low=0, spare=None, strength=None)
def test_roots_equal_exhaustive_search(success, budget, low, spare, strength):
    high = None if spare is None else low + spare
    if low * len(success) > budget:
        with pytest.raises(ValueError, match="min_rollouts"):
            allocate_roots(success, budget, min_rollouts=low, max_rollouts=high, strength=strength)
        return
    counts = allocate_roots(success, budget, min_rollouts=low, max_rollouts=high, strength=strength)
    values = root_value(np.array(success)[:, None], np.arange(budget + 1)[None], strength=strength)
    check_optimal(counts, values, budget, low, high)


@given(
    data=st.lists(st.tuples(probability, st.floats(0.1, 50)), min_size=1, max_size=8),
    budget=st.integers(0, 24),
    cap=st.sampled_from([1, 2, 3, 8]),
)
@settings(max_examples=300, deadline=None)
def test_roots_equal_exhaustive_search_with_different_strengths(data, budget, cap):
    success, strength = np.array(data).T
    values = root_value(success[:, None], np.arange(budget + 1)[None], strength=strength[:, None])
    check_optimal(allocate_roots(success, budget, max_rollouts=cap, strength=strength), values, budget, 0, cap)


@given(
    data=st.lists(st.tuples(probability, st.sampled_from([0.0, 1.0, 0.4])), min_size=1, max_size=6),
    budget=st.integers(0, 14),
    cap=st.one_of(st.none(), st.integers(0, 5)),
)
@settings(max_examples=400, deadline=None)
def test_prefixes_equal_exhaustive_search(data, budget, cap):
    success, rewards = np.array(data).T
    values = prefix_value(success[:, None], rewards[:, None], np.arange(budget + 1)[None])
    check_optimal(allocate_prefixes(success, rewards, budget, max_per_prefix=cap), values, budget, 0, cap)
    blind = root_value(success[:, None], np.arange(1, budget + 2)[None])
    check_optimal(allocate_prefixes_by_value(success, budget, max_per_prefix=cap), blind, budget, 0, cap)


def test_root_value_is_the_probability_of_both_outcomes():
    assert root_value(0.5, [0, 1, 2, 3, 4]).tolist() == [0, 0, 0.5, 0.75, 0.875]
    assert root_value(0.2, 2) == pytest.approx(0.32)
    assert root_value([0.0, 1.0], 9).tolist() == [0, 0]


def test_posterior_tells_ignorance_from_an_even_prompt():
    """METHOD section 2: Beta(1, 1) and Beta(11, 11) at m = 5 score 0.667 and 0.909, the plug-in 0.9375 for both."""
    assert root_value(0.5, 5) == 0.9375
    assert root_value([0.5, 0.5], 5, strength=[2, 22]) == pytest.approx([2 / 3, 0.909], abs=5e-4)


def test_first_two_rollouts_are_bought_together():
    assert allocate_roots([0.5, 0.4, 0.01], 4).tolist() == [2, 2, 0]  # 0.5 + 0.48 > 0.875
    # the fifth unit: a third rollout of the first prompt brings .25, of the second .24
    assert allocate_roots([0.5, 0.4, 0.01], 5).tolist() == [3, 2, 0]
    # 4 units, u = .25 and .09: 4 + 0 brings .875, 2 + 2 brings .68
    assert allocate_roots([0.5, 0.1], 4).tolist() == [4, 0]


def test_a_unit_too_few_for_a_bundle():
    # λ = .16 with one unit left after m = 3. Four on the first: .875. Two and two: .5 + .32 = .82.
    assert allocate_roots([0.5, 0.2], 4).tolist() == [4, 0]
    # u = .25, .24: after 3, four on the first: .875; two and two: .98
    assert allocate_roots([0.5, 0.6], 4).tolist() == [2, 2]
    # caps of 2: the fifth unit can only be wasted, yet the counts add up
    assert allocate_roots([0.5, 0.5, 0.5], 5, max_rollouts=2).tolist() == [2, 2, 1]
    assert allocate_roots([0.5, 0.1], 1).sum() == 1


def test_budget_beyond_the_caps_is_not_spendable():
    assert allocate_roots([0.5, 0.0], 9, max_rollouts=3).tolist() == [3, 3]
    assert allocate_prefixes([0.5, 0.0], [1, 0], 9, max_per_prefix=3).tolist() == [3, 3]
    assert allocate_roots([], 5).tolist() == []
    assert allocate_prefixes([], [], 5).tolist() == []


def test_prefixes_prefer_a_surprising_outcome():
    # success where V = .2: a continuation differs with probability .8, then .16; where V = .5: .5, .25
    assert allocate_prefixes([0.2, 0.5], [1, 1], 1).tolist() == [1, 0]
    assert allocate_prefixes([0.2, 0.5], [1, 1], 3).tolist() == [1, 2]
    assert allocate_prefixes([0.2, 0.5], [0, 0], 2).tolist() == [0, 2]  # .2 against .25 for the second


def test_cost_ranks_by_value_per_token():
    # per token: .5/10, .25/10 … against .4/4, .24/4
    assert allocate_prefixes([0.5, 0.6], [1, 1], 2, cost=[10, 4]).tolist() == [0, 2]
    assert allocate_prefixes([0.5, 0.6], [1, 1], 2, cost=[10, 10]).tolist() == [1, 1]


def test_a_budget_in_tokens_buys_what_is_worth_most_for_them():
    # Contrast spends 400 tokens on the first: .9375. For them, 200 of the second, one token each, go with 2 of the
    # first: .75 + 1 − .99^200 = 1.616; with 3 there are 100 of them: .875 + .634 = 1.509.
    assert allocate_prefixes([0.5, 0.99], [1, 1], 4).tolist() == [4, 0]
    assert allocate_prefixes_by_tokens([0.5, 0.99], [1, 1], 400, [100, 1]).tolist() == [2, 200]
    assert allocate_prefixes_by_tokens([0.5, 0.99], [1, 1], 400, [100, 1], max_per_prefix=4).tolist() == [4, 0]
    assert allocate_prefixes_by_tokens([0.5, 0.99], [1, 1], 99, [100, 1], max_per_prefix=4).tolist() == [0, 4]
    assert allocate_prefixes_by_tokens([1.0, 0.0], [1, 0], 400, [1, 1]).tolist() == [0, 0]
    assert allocate_prefixes_by_tokens([], [], 400, []).tolist() == []
    # Far more tokens than steps: the costs are rounded up to the grid, never down.
    counts = allocate_prefixes_by_tokens([0.5, 0.4], [1, 0], 1.002e6, [3e5, 2e5])
    assert counts @ [3e5, 2e5] <= 1.002e6
    assert prefix_value([0.5, 0.4], [1, 0], counts).sum() == pytest.approx(0.75 + 0.64)


@given(
    data=st.lists(st.tuples(probability, st.sampled_from([0.0, 1.0, 0.4]), st.integers(1, 9)), min_size=1, max_size=4),
    tokens=st.integers(0, 24),
    cap=st.one_of(st.none(), st.integers(0, 4)),
)
@settings(max_examples=200, deadline=None)
def test_a_budget_in_tokens_equals_exhaustive_search(data, tokens, cap):
    success, rewards, cost = (np.array(part, dtype=float) for part in zip(*data, strict=True))
    counts = allocate_prefixes_by_tokens(success, rewards, tokens, cost, max_per_prefix=cap)
    assert counts @ cost <= tokens
    assert cap is None or (counts <= cap).all()
    most = [int(tokens // c) if cap is None else min(cap, int(tokens // c)) for c in cost]
    every = itertools.product(*(range(m + 1) for m in most))
    best = max(prefix_value(success, rewards, np.array(k)).sum() for k in every if np.array(k) @ cost <= tokens)
    assert prefix_value(success, rewards, counts).sum() == pytest.approx(best, abs=1e-9)


@given(
    data=st.lists(st.tuples(probability, st.integers(1, 6)), min_size=1, max_size=4),
    price=st.floats(0.001, 0.3),
    cap=st.integers(2, 6),
    strength=st.sampled_from([None, 3.0]),
)
@settings(max_examples=150, deadline=None)
def test_roots_at_a_price_equal_exhaustive_search(data, price, cap, strength):
    success, cost = (np.array(part, dtype=float) for part in zip(*data, strict=True))
    counts = allocate_roots_at_price(success, price, cost, max_rollouts=cap, strength=strength)
    assert (counts <= cap).all()
    assert not (counts == 1).any()
    for v, c, m in zip(success, cost, counts, strict=True):
        left = [root_value(v, k, strength=strength) - price * c * k for k in range(cap + 1)]
        assert left[m] == pytest.approx(max(left), abs=1e-9)


def test_at_the_price_that_spends_m_roots_stage_1_is_the_published_one():
    """Costs alike. u = .25, .21, .09: three and three of 6 at any price between .09 and .21 a rollout of one token."""
    success, one = [0.5, 0.3, 0.1], np.ones(3)
    assert allocate_roots(success, 6, max_rollouts=3).tolist() == [3, 3, 0]
    assert allocate_roots_at_price(success, 0.1, one, max_rollouts=3).tolist() == [3, 3, 0]
    # Twice as dear, the second is worth .105 a token; no more than two at a time may be had.
    assert allocate_roots_at_price(success, 0.11, np.array([1, 2, 1]), max_rollouts=2).tolist() == [2, 0, 0]


def test_stage_1_at_a_price_prefers_the_short_of_two_even_prompts_and_still_explores():
    budget = BudgetConfig(root_rollouts=4, pool_size=2, max_rollouts=8, stage1="price", explore_share=0)
    beliefs = estimates(0.5, 0.5)
    rng = np.random.default_rng(0)
    assert stage1_rule(budget).plan(beliefs, 4, rng).tolist() == [2, 2]  # no price yet: M roots
    # E[v(1 − v)] of Beta(5, 5) is .25·10/11 = .227 for each of three; E[v³(1 − v)]·2 for the fourth, and so on.
    marginals = np.diff(root_value(0.5, np.arange(3, 9), strength=10.0))
    priced = replace(beliefs, tokens=np.array([10.0, 30.0]), price=0.01)
    counts = stage1_rule(budget).plan(priced, 4, rng)
    assert counts.tolist() == [3 + (marginals / 10 > 0.01).sum(), 0]
    # All of the budget explores: a pair on each of both, whatever the price.
    explores = replace(budget, explore_share=1.0)
    assert stage1_rule(explores).plan(replace(priced, price=9.0), 4, rng).tolist() == [2, 2]


@pytest.mark.parametrize("bad", [[float("nan")], [-0.1], [1.1], [[0.5]]])
def test_what_is_no_probability_is_refused(bad):
    with pytest.raises(ValueError, match="success"):
        allocate_roots(bad, 4)
    with pytest.raises(ValueError, match="success"):
        allocate_prefixes(bad, [1], 4)


def test_bad_limits_are_refused():
    with pytest.raises(ValueError, match="max_rollouts"):
        allocate_roots([0.5], 4, min_rollouts=3, max_rollouts=2)
    with pytest.raises(ValueError, match="rewards"):
        allocate_prefixes([0.5], [1, 0], 2)
    with pytest.raises(ValueError, match="cost"):
        allocate_prefixes([0.5], [1], 2, cost=[0])


def test_a_million_units_over_a_hundred_thousand_prompts():
    """Size, not time: the lazily grown table must stay exact where rows reach far beyond their first width."""
    rng = np.random.default_rng(0)
    success = np.concatenate([rng.beta(0.05, 0.05, 99_998), [0.5, 1e-4]])
    counts = allocate_roots(success, 1_000_000)
    assert counts.sum() == 1_000_000
    # optimal: no unit can be moved to a better place between prompts that have at least 3
    many = counts >= 3
    last = root_value(success[many], counts[many]) - root_value(success[many], counts[many] - 1)
    following = root_value(success[many], counts[many] + 1) - root_value(success[many], counts[many])
    assert last.min() >= following.max() - 1e-12
    assert allocate_roots([0.5, 1e-3, 0.0], 100_000).tolist()[2] == 0


def estimates(*means, strength=10.0):
    mean = np.array(means)
    return Estimates(a=mean * strength, b=(1 - mean) * strength)


MEANS = estimates(0.01, 0.97, 0.5, 0.3, 0.65, 0.02)


@pytest.mark.parametrize(
    ("rule", "counts"),
    [
        ("uniform", [4, 4, 2, 0, 0, 0]),
        ("dapo", [4, 4, 2, 0, 0, 0]),
        ("pcl", [0, 0, 4, 2, 4, 0]),
        # a = .0099, .0291 for the batch of 10 // 4 = 2 prompts; n* − 1 in the ratio sqrt(.0099 / .0291) = .58
        ("vip", [4, 6, 0, 0, 0, 0]),
        # u = .25, .2275, .21: 4 − 3 − 3 brings .875 + .6825 + .63 = 2.1875, 4 − 4 − 2 2.194 (d4 = .124 < .21 = d3)
        ("point", [0, 0, 4, 3, 3, 0]),
    ],
)
def test_root_rules(rule, counts):
    config = BudgetConfig(root_rollouts=10, pool_size=6, uniform_rollouts=4, max_rollouts=6, stage1=rule)
    assert plan_roots(config, MEANS, np.random.default_rng(0)).tolist() == counts


def test_beta_rule_prefers_what_is_known_to_be_even():
    config = BudgetConfig(root_rollouts=4, pool_size=2, stage1="beta")
    known = Estimates(a=np.array([0.3, 20.0]), b=np.array([0.3, 26.0]))
    assert plan_roots(config, known, np.random.default_rng(0)).tolist() == [0, 4]
    point = BudgetConfig(root_rollouts=4, pool_size=2, stage1="point")
    assert plan_roots(point, known, np.random.default_rng(0)).tolist() == [2, 2]


def test_a_share_of_the_roots_goes_to_random_pairs_whatever_is_believed():
    """All are thought sure but prompts 0 and 1; 8 of 16 roots are 4 random pairs, the knapsack spends the others."""
    config = BudgetConfig(root_rollouts=16, pool_size=40, stage1="point", explore_share=0.5, max_rollouts=4)
    beliefs = estimates(*([0.5, 0.5] + [0.999] * 38))
    rng = np.random.default_rng(0)
    counts = np.array([plan_roots(config, beliefs, rng) for _ in range(200)])
    assert (counts.sum(axis=1) == 16).all()
    # Prompts 0 and 1 get 4 each when they are not among the four pairs: with probability 36·35 / (40·39) = .81.
    assert 0.7 < ((counts[:, :2] == 4).all(axis=1)).mean() < 0.9
    # A pair falls on prompt 39 with probability 4 / 40.
    assert 0.04 < (counts[:, 39] == 2).mean() < 0.18


def test_thompson_explores_by_the_posterior():
    """A prompt known to be at .9 is never nearest .5; of two with mean .9 the vague one is drawn sometimes."""
    config = BudgetConfig(root_rollouts=4, pool_size=2, uniform_rollouts=4, stage1="thompson")
    beliefs = Estimates(a=np.array([9000.0, 0.9]), b=np.array([1000.0, 0.1]))
    rng = np.random.default_rng(0)
    chosen = np.array([plan_roots(config, beliefs, rng) for _ in range(300)])
    assert set(map(tuple, chosen.tolist())) == {(4, 0), (0, 4)}
    # P(|Beta(.9, .1) − .5| < .4) = P(.1 < x < .9) ≈ .19
    assert 0.1 < (chosen[:, 1] == 4).mean() < 0.3


@pytest.mark.parametrize(
    ("rule", "explore_share"),
    [
        *((rule, 0.0) for rule in ["uniform", "pcl", "thompson", "vip", "dapo", "point", "beta"]),
        *((rule, share) for rule in ["point", "beta"] for share in [0.3, 0.5, 1.0]),
    ],
)
@given(
    data=st.lists(st.floats(0.001, 0.999), min_size=1, max_size=12),
    budget=st.integers(2, 40),
    group=st.integers(2, 8),
    cap=st.integers(2, 9),
)
@settings(max_examples=60, deadline=None)
def test_every_root_rule_spends_the_budget_within_caps(rule, explore_share, data, budget, group, cap):
    if len(data) * cap < budget:
        budget = max(2, len(data) * cap)
    config = BudgetConfig(
        root_rollouts=budget,
        pool_size=len(data),
        uniform_rollouts=group,
        max_rollouts=cap,
        stage1=rule,
        explore_share=explore_share,
    )
    counts = plan_roots(config, estimates(*data), np.random.default_rng(0))
    assert counts.sum() == budget
    assert ((counts >= 0) & (counts <= cap)).all()


def test_a_lone_leftover_rollout_joins_a_group():
    config = BudgetConfig(root_rollouts=9, pool_size=4, uniform_rollouts=4, max_rollouts=6, stage1="uniform")
    counts = plan_roots(config, estimates(0.5, 0.5, 0.5, 0.5), np.random.default_rng(0))
    assert counts.tolist() == [5, 4, 0, 0]


def turn(parent, rollout, num_generated, value=None):
    return Node(
        parent=parent,
        rollout=rollout,
        token_ids=tuple(range(num_generated + 1)),
        num_generated=num_generated,
        logprobs=(-1.0,) * num_generated,
        version_spans=(VersionSpan(0, 3),),
        value=value,
    )


def two_rollouts():
    """Rollout 0: turns 1-2-3, 2 + 3 + 4 tokens, succeeds; rollout 1: turns 4-5, 5 + 6 tokens, fails."""
    prompt = Node(parent=-1, rollout=-1, token_ids=(7,), num_generated=0, value=0.4)
    nodes = (
        prompt,
        turn(0, 0, 2, 0.3),
        turn(1, 0, 3, 0.9),
        turn(2, 0, 4, 0.95),
        turn(0, 1, 5, 0.2),
        turn(4, 1, 6, 0.0),
    )
    rollouts = (Rollout(kind="root", anchor=0, leaf=3, reward=1.0), Rollout(kind="root", anchor=0, leaf=5, reward=0.0))
    return RolloutTree(task=Task(id="t", domain="d", kind="k", data={}), nodes=nodes, rollouts=rollouts)


def test_anchors_are_turns_that_are_not_the_last():
    anchors = find_anchors(two_rollouts())
    # beyond depth 1: 3 + 4 and 6 tokens; beyond depth 2: 4
    assert anchors == [
        Anchor(node=1, value=0.3, reward=1.0, expected_tokens=6.5),
        Anchor(node=2, value=0.9, reward=1.0, expected_tokens=4.0, depth=2),
        Anchor(node=4, value=0.2, reward=0.0, expected_tokens=6.5),
    ]


def test_prefix_rules():
    anchors = find_anchors(two_rollouts())
    rng = np.random.default_rng(0)

    def plan(rule, budget, cap=None):
        config = BudgetConfig(stage2=rule, max_per_prefix=cap)
        return stage2_rule(config).plan(anchors, budget, rng).tolist()

    # differs with probability .7, .1, .2; then .7·.3 = .21, .16 …
    assert plan("contrast", 3) == [2, 0, 1]
    assert plan("contrast", 3, cap=1) == [1, 1, 1]
    # contrast would spend 2·6.5 = 13 tokens, worth .91; 6.5 + 4 are worth .8, 2·6.5 it stays
    assert plan("contrast_per_token", 2) == [2, 0, 0]
    # contrast: [2, 0, 1], 19.5 tokens worth 1.11; 13 + 4 are worth 1.01, 6.5 + 3·4 .97
    assert plan("contrast_per_token", 3) == [2, 0, 1]
    # 2u = .42, .18, .32, then u = .21, .09, .16
    assert plan("contrast_value_only", 3) == [2, 0, 1]
    assert plan("none", 3) == [0, 0, 0]
    drawn = np.array([plan("random", 6) for _ in range(400)])
    assert (drawn.sum(axis=1) == 6).all()
    assert drawn.mean(axis=0) == pytest.approx([2, 2, 2], abs=0.2)
    assert np.array(plan("random", 9, cap=2)).tolist() == [2, 2, 2]


def test_dynamic_sampling_drops_what_agrees():
    tree = two_rollouts()
    alike = RolloutTree(task=tree.task, nodes=tree.nodes[:4], rollouts=tree.rollouts[:1])
    assert stage1_rule(BudgetConfig(stage1="dapo")).trains_on(tree)
    assert not stage1_rule(BudgetConfig(stage1="dapo")).trains_on(alike)
    assert stage1_rule(BudgetConfig(stage1="uniform")).trains_on(alike)


def test_exploring_where_all_candidates_are_explored_still_spends_the_budget():
    config = BudgetConfig(root_rollouts=64, pool_size=8, max_rollouts=8, stage1="point", explore_share=0.5)
    assert plan_roots(config, estimates(*[0.5] * 8), np.random.default_rng(0)).tolist() == [8] * 8
    # Half of 12 roots are three pairs; the fourth prompt takes its cap of 4, so two more go on top of the pairs.
    config = BudgetConfig(root_rollouts=12, pool_size=4, max_rollouts=4, stage1="point", explore_share=0.5)
    assert sorted(plan_roots(config, estimates(*[0.5] * 4), np.random.default_rng(0))) == [2, 3, 3, 4]


def test_exploring_leaves_the_others_their_minimum():
    config = BudgetConfig(
        root_rollouts=17, pool_size=8, min_rollouts=2, max_rollouts=4, stage1="point", explore_share=1.0
    )
    counts = plan_roots(config, estimates(*[0.5] * 8), np.random.default_rng(0))
    assert sorted(counts) == [2] * 7 + [3]


def test_the_first_rounds_of_a_rule_that_needs_estimates_are_small_groups():
    config = BudgetConfig(root_rollouts=8, pool_size=6, stage1="beta", warmup_rounds=2, warmup_rollouts=2)
    beliefs = estimates(0.01, 0.01, 0.01, 0.01, 0.5, 0.5)
    first, later = stage1_rule(config, 1), stage1_rule(config, 2)
    assert (first.needs_estimates, later.needs_estimates) == (False, True)
    assert first.plan(beliefs, 8, np.random.default_rng(0)).tolist() == [2, 2, 2, 2, 0, 0]
    assert later.plan(beliefs, 8, np.random.default_rng(0)).tolist() == [0, 0, 0, 0, 4, 4]
    uniform = stage1_rule(BudgetConfig(stage1="uniform", warmup_rounds=2, uniform_rollouts=4), 0)
    assert uniform.plan(beliefs, 8, np.random.default_rng(0)).tolist() == [4, 4, 0, 0, 0, 0]
