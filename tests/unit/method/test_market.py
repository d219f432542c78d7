"""One price for all prompts, ρ and s by depth, and the decision whether continuations pay."""

import itertools
import logging
from collections import deque
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.studies.break_even import decided, make_process, measured_break_even, teaches
from scripts.studies.price import shares
from tests.unit.method.test_credit import make_tree
from trace_async.config import BudgetConfig, ConfigError
from trace_async.method.allocation import allocate_prefixes
from trace_async.method.anchors import Anchor, prompt_anchor
from trace_async.method.market import PROBE_EVERY, Market, Offer, marginal_contrast
from trace_async.method.posterior import Estimates
from trace_async.method.registry import stage1_rule, stage2_rule
from trace_async.method.stage2.payoff import MIN_ANCHORS, DepthFigures, break_even
from trace_async.trees.tree import Rollout

RNG = np.random.default_rng(0)


def anchor(value, reward=1.0, tokens=10.0, depth=1):
    return Anchor(node=1, value=value, reward=reward, expected_tokens=tokens, depth=depth)


@given(
    data=st.lists(st.tuples(st.floats(0.01, 0.99), st.sampled_from([0.0, 1.0])), min_size=1, max_size=8),
    budget=st.integers(0, 12),
)
@settings(max_examples=200, deadline=None)
def test_at_a_price_of_its_own_that_spends_k_a_prompt_buys_as_published(data, budget):
    anchors = [anchor(value, reward) for value, reward in data]
    rates = np.sort(np.concatenate([marginal_contrast(a, 20) / 10 for a in anchors]))[::-1]
    price = (rates[budget] + rates[budget - 1]) / 2 if budget else rates[0] + 1
    if budget and rates[budget - 1] - rates[budget] < 1e-9:
        return  # a tie at the price: the published rule breaks it by order
    config = BudgetConfig(stage2="price", max_per_prefix=20)
    found = stage2_rule(config, Offer(price=price)).spend(anchors, 99, RNG)
    published = allocate_prefixes([a.value for a in anchors], [a.reward for a in anchors], budget, max_per_prefix=20)
    assert found.tolist() == published.tolist()


@given(
    data=st.lists(
        st.tuples(st.floats(0.01, 0.99), st.sampled_from([0.0, 0.3, 1.0]), st.integers(1, 9), st.booleans()),
        min_size=1,
        max_size=4,
    ),
    price=st.floats(0.001, 0.2),
)
@settings(max_examples=100, deadline=None)
def test_what_is_bought_at_a_price_is_the_most_that_its_tokens_can_buy(data, price):
    """Against every way to spend as many tokens, over turns and prompts alike."""
    anchors = [
        Anchor(node=1, value=v, reward=r, expected_tokens=c, depth=int(is_turn), strength=None if is_turn else 4.0)
        for v, r, c, is_turn in data
    ]
    rule = stage2_rule(BudgetConfig(stage2="price", max_per_prefix=3), Offer(price=price))
    counts, costs = rule.spend(anchors, 9, RNG), np.array([a.expected_tokens for a in anchors])
    worth = [np.concatenate([[0.0], np.cumsum(marginal_contrast(a, 3))]) for a in anchors]

    def total(ks):
        return sum(w[k] for w, k in zip(worth, ks, strict=True))

    every = itertools.product(range(4), repeat=len(anchors))
    assert total(counts) == pytest.approx(max(total(k) for k in every if np.array(k) @ costs <= counts @ costs))


def test_over_a_run_price_comes_near_the_optimum_and_the_published_budget_does_not():
    price, published = (shares(rule, num_prompts=240, per_root=2)[0] for rule in ("price", "contrast"))
    assert price > 0.95
    assert published < 0.75


def test_an_easy_prompt_buys_nothing_at_the_price_at_which_an_even_one_buys():
    rule = stage2_rule(BudgetConfig(stage2="price"), Offer(price=0.02))
    # per token: .5/10 and .25/10 of the even one; .03/10 of the sure one; .5/40 where it costs four times as much
    assert rule.spend([anchor(0.5), anchor(0.97), anchor(0.5, tokens=40)], 4, RNG).tolist() == [2, 0, 0]
    # Continuations of this depth were four times as dear as the prompts' own rollouts had made expect.
    dear = stage2_rule(BudgetConfig(stage2="price"), Offer(price=0.02, dearer=(0.0, 4.0)))
    assert dear.spend([anchor(0.5), anchor(0.5, depth=2)], 4, RNG).tolist() == [0, 2]


def test_without_a_price_yet_the_budget_is_spent_as_published():
    rule = stage2_rule(BudgetConfig(stage2="price"))
    assert rule.spend([anchor(0.2), anchor(0.5)], 3, RNG).tolist() == [1, 2]


def test_a_prompt_whose_roots_agree_is_open_as_far_as_its_posterior_says():
    """Beta(.5, 1.5) and two failures: Beta(.5, 3.5). Another succeeds with 1/8, only the one after it with 7/8·.5/5."""
    found = prompt_anchor([0.0, 0.0], value=0.25, strength=2.0, expected_tokens=10)
    assert found == Anchor(node=0, value=0.125, reward=0.0, expected_tokens=10, depth=0, strength=4.0)
    assert marginal_contrast(found, 2) == pytest.approx([0.125, 0.0875])
    assert prompt_anchor([0.0, 1.0], value=0.25, strength=2.0, expected_tokens=10) is None
    # Nothing known before: Beta(1, 1), and Beta(3, 1) after two successes.
    unknown = prompt_anchor([1.0, 1.0], value=None, strength=None, expected_tokens=10)
    assert unknown is not None
    assert (unknown.value, unknown.strength) == (0.75, 4.0)


def test_topup_buys_further_roots_while_they_are_worth_the_price():
    prompt = prompt_anchor([0.0, 0.0], value=0.25, strength=2.0, expected_tokens=10)
    assert prompt is not None
    config = BudgetConfig(stage2="topup")
    for price, bought in ((0.0126, 0), (0.0124, 1), (0.0087, 2)):
        assert stage2_rule(config, Offer(price=price)).spend([prompt], 4, RNG).tolist() == [bought]
    assert stage2_rule(config).spend([prompt], 5, RNG).tolist() == [2]  # no price yet: a root for two continuations
    # At one price for both, the better buy of the two: a continuation at V = .5 after a success, .5 and .25 for 10.
    both = stage2_rule(BudgetConfig(stage2="price"), Offer(price=0.02)).spend([prompt, anchor(0.5)], 4, RNG)
    assert both.tolist() == [0, 2]
    both = stage2_rule(BudgetConfig(stage2="price"), Offer(price=0.012)).spend([prompt, anchor(0.5)], 4, RNG)
    assert both.tolist() == [1, 3]


def test_topup_meets_its_budget_in_tokens():
    """Two roots of 20 tokens, so 20 tokens a prompt for further ones; about half of the prompts agree."""
    config = BudgetConfig(stage2="topup", continuations_per_root=1)
    market, spent, budget = Market(config), 0.0, 0.0
    for number in range(400):
        chance = RNG.beta(0.6, 0.6)
        value, strength = float(np.clip(chance, 0.02, 0.98)), 4.0
        rewards = (RNG.random(2) < chance).astype(float).tolist()
        prompt = prompt_anchor(rewards, value=value, strength=strength, expected_tokens=20)
        anchors = [prompt] if prompt else []
        counts = stage2_rule(config, market.offer()).spend(anchors, 2, RNG) if anchors else [0]
        tree = grown([value, value], rewards, [0, 0])
        tree = further_roots(tree, int(sum(counts)), value)
        market.observe(tree, root_strength=strength)
        if number >= 100:
            spent += 20 * sum(counts)
            budget += 20
    assert spent == pytest.approx(budget, rel=0.15)


def further_roots(tree, count, value):
    """With so many roots of one turn of 20 tokens that Stage 2 bought; V of the prompt is `value`."""
    nodes, rollouts = [replace(tree.nodes[0], value=value), *tree.nodes[1:]], [*tree.rollouts]
    for _ in range(count):
        turn = make_tree([0], [([1], 0.0)], tokens={1: 20}).nodes[1]
        rollouts.append(Rollout(kind="root", anchor=0, leaf=len(nodes), reward=float(RNG.random() < value), round=1))
        nodes.append(replace(turn, rollout=len(rollouts) - 1))
    return replace(tree, nodes=tuple(nodes), rollouts=tuple(rollouts))


def grown(values, rewards, counts):
    """One root rollout of two turns of 10 tokens per value; `counts` continuations of 30 at each first turn."""
    parents, rollouts, tokens = [], [], {}
    for value_index in range(len(values)):
        first = len(parents) + 1
        parents += [0, first]
        rollouts.append(([first, first + 1], rewards[value_index]))
        tokens |= {first: 10, first + 1: 10}
    for index, count in enumerate(counts):
        for _ in range(count):
            parents.append(2 * index + 1)
            rollouts.append(([len(parents)], float(RNG.random() < values[index])))
            tokens[len(parents)] = 30
    tree = make_tree(parents, rollouts, tokens)
    nodes = list(tree.nodes)
    for index, value in enumerate(values):
        nodes[2 * index + 1] = replace(nodes[2 * index + 1], value=value)
    return replace(tree, nodes=tuple(nodes))


@pytest.mark.parametrize("per_root", [1, 2, 6])
def test_spending_meets_the_budget_in_tokens_though_continuations_are_dearer_than_thought(per_root):
    """Roots write 20 tokens, of which 10 after the fork; continuations write 30. Values differ from prompt to prompt.

    The budget: N·20/2 tokens for a root. As published, N continuations of 30 tokens would cost three times as much.
    """
    config = BudgetConfig(stage2="price", continuations_per_root=per_root)
    market, spent, budget = Market(config), 0.0, 0.0
    for number in range(400):
        values = RNG.beta(0.6, 0.6, 3)
        offer = market.offer()
        rewards = (RNG.random(3) < values).astype(float).tolist()
        anchors = [anchor(float(value), reward) for value, reward in zip(values, rewards, strict=True)]
        counts = stage2_rule(config, offer).spend(anchors, 3 * per_root, RNG)
        market.observe(grown(values.tolist(), rewards, counts))
        if number >= 100:
            spent += 30 * counts.sum()
            budget += 3 * per_root * 20 / 2
    assert spent == pytest.approx(budget, rel=0.15)


def test_figures_by_hand():
    # Roots 1-2 ✓ and 3-4 ✗; at 1 the continuations 5 ✓ and 6 ✗; at 3 one, 7 ✗, which says nothing of the variance.
    tree = make_tree(
        [0, 1, 0, 3, 1, 1, 3],
        [([1, 2], 1.0), ([3, 4], 0.0), ([5], 1.0), ([6], 0.0), ([7], 0.0)],
        tokens={1: 4, 2: 6, 3: 2, 4: 8, 5: 5, 6: 7, 7: 6},
    )
    # Turns 1 and 3 waited three seconds for a tool each, those of the continuations one.
    seconds = {1: 3.0, 3: 3.0, 5: 1.0, 6: 1.0, 7: 1.0}
    tree = replace(tree, nodes=tuple(replace(n, seconds=seconds.get(i, 0.0)) for i, n in enumerate(tree.nodes)))
    market = Market(BudgetConfig())
    market.observe(tree)
    found = market.figures()
    # Before the forks 4 + 4 + 2 tokens, after them 5 + 7 + 6. Variance ½ among two that differ, ½ among the roots.
    # Three continuations of two anchors.
    seconds_share = found[1].share_before_s
    assert seconds_share == pytest.approx(0.75)
    assert found == {
        1: DepthFigures(
            num_anchors=1,
            rho=0.0,
            share_before=10 / 28,
            share_before_s=seconds_share,
            num_roots=2.0,
            num_continuations=1.5,
        )
    }
    # The roots went on with 6 and 8 tokens, so 7 were expected of each continuation, 21 of three; they wrote 18.
    assert market.dearer() == (0.0, pytest.approx(18 / 21))
    assert DepthFigures(3, 0.9, 0.1).pays()  # too little was measured to say no
    slow_tools = DepthFigures(99, 0.2, 0.5, 0.9)
    assert (slow_tools.pays(), slow_tools.pays(in_seconds=True)) == (False, True)
    assert set(market.metrics()) == {"stage2/share_before/turn_1", "stage2/share_before_s/turn_1"}


def test_the_break_even_by_hand():
    """Nothing decided by the first half (ρ = 0, γ = 1), two roots with three continuations each.

    Variance 1 of the roots' gradient and ½·4/(9·2) = 1/9 of the continuations': 4/(10/9) = 3.6, as sure as 4.6 roots,
    for the cost of 2 + 6(1 − s). With all decided the continuations add nothing: as sure as two roots, for more.
    """
    assert break_even(0.0, 0.5, 2, 3) == pytest.approx(1 - 2.6 / 6)
    assert break_even(1.0, 0.5, 2, 3) == 1.0
    # γ = .8; 1.8²/(1 + .8·½·2/9) = 2.976 roots more than one. Two-stage sampling would have said 2·.2/1.2 = ⅓.
    assert break_even(0.2, 0.5, 2, 3) == pytest.approx(1 - (1.8**2 / (1 + 0.8 / 9) - 1) / 6)
    # As much of the policy's doing: of what all turns decide (.5) the prefix has .2.
    assert break_even(0.2, 0.5, 2, 3, decided_by_all=0.5) == pytest.approx(1 - (1.6**2 / (1 + 0.8 / 9) - 1) / 6)
    # A lone root has no root term: the continuations' own, (1 − ρ)·½·4/9 for γ².
    assert break_even(0.0, 0.5, 1, 3) == pytest.approx(1 - (1 / (0.5 * 4 / 9)) / 3)


@pytest.mark.parametrize(("weights", "depth"), [((3.0, 0.6, 0.6, 0.6, 0.6, 0.6), 2), ((0.6,) * 5 + (3.0,), 3)])
def test_the_break_even_is_that_of_gradients_of_grown_trees(weights, depth):
    """Decided early, continuations never pay; decided late, they pay from a third of the way on at the latest.

    Two-stage sampling says .81 and .04.
    """
    process = make_process(weights, 0.5)
    alone = [teaches(process, m, 400, seed=m) for m in (2, 5, 8)]
    forked = teaches(process, 2, 400, seed=99, depth=depth, per_root=3)
    rho, of_all = decided(process, depth), decided(process, 6)
    said = break_even(rho, depth / 6, 2, 3, decided_by_all=of_all)
    assert measured_break_even(forked, (2, 5, 8), alone, 2, 3) == pytest.approx(said, abs=0.2)


def test_rho_of_graded_rewards_is_of_their_variance_and_not_of_v_times_one_minus_v():
    """Roots .4 and .6: variance .02; continuations .45 and .55 of one, .5 and .5 of the other: .005 and 0.

    So ρ = 1 − .005/.04. With V(1 − V), which is near ¼ everywhere, it would be near 0.
    """
    tree = make_tree(
        [0, 1, 0, 3, 1, 1, 3, 3],
        [([1, 2], 0.4), ([3, 4], 0.6), ([5], 0.45), ([6], 0.55), ([7], 0.5), ([8], 0.5)],
    )
    market = Market(BudgetConfig())
    market.observe(tree)
    assert market.figures()[1].rho == pytest.approx(1 - 0.005 / 0.04)


def estimates(success, strength, tokens, price):
    return Estimates(success * strength, (1 - success) * strength, np.full(len(success), tokens), price)


def one_prompt(config, market, value, count):
    """A prompt's tree as its rules grow it; certain of V, as with any number of pseudo rollouts."""
    rewards = (RNG.random(count) < value).astype(float).tolist()
    prompt = prompt_anchor(rewards, value=value, strength=50.0, expected_tokens=20)
    rule = stage2_rule(config, market.offer())
    turns = [anchor(value, reward, tokens=30) for reward in rewards] if rule.forks else []
    anchors = [prompt, *turns] if prompt and rule.buys_roots else turns
    bought = rule.spend(anchors, 2 * count, RNG) if anchors else np.zeros(0, dtype=int)
    roots = int(bought[0]) if prompt and rule.buys_roots else 0
    return further_roots(grown([value] * count, rewards, bought[len(bought) - len(turns) :]), roots, value)


def spending(stage2, num_rounds, *, late=0, share_open=lambda number: 0.3):
    """Tokens of each round of 48 candidates, M = 24 roots of 20 tokens. Trees end `late` rounds after their planning.

    `share_open`: of a round's candidates, those that may go either way.
    """
    config = BudgetConfig(
        stage1="price", stage2=stage2, root_rollouts=24, pool_size=48, max_rollouts=6, explore_share=0
    )
    market, under_way = Market(config), deque()
    for number in range(num_rounds):
        success = np.where(RNG.random(48) < share_open(number), RNG.uniform(0.3, 0.7, 48), 0.02)
        beliefs = estimates(success, 50.0, 20.0, market.price())
        if number <= late:
            beliefs = replace(beliefs, tokens=None)  # no tree has ended, so nobody knows what a root costs
        counts = stage1_rule(config).plan(beliefs, 24, RNG)
        assert not (counts == 1).any()
        market.observe_round(beliefs, counts)
        trees = [one_prompt(config, market, float(success[i]), counts[i]) for i in np.flatnonzero(counts)]
        under_way.append(trees)
        if len(under_way) > late:
            for tree in under_way.popleft():
                market.observe(tree, root_strength=50.0)
        yield sum(tree.num_generated_tokens for tree in trees)


@pytest.mark.parametrize("stage2", ["none", "topup", "price"])
def test_one_price_for_both_stages_keeps_the_tokens_of_a_round(stage2):
    """480 tokens a round, with N = 2 twice as many. Pools are rich and poor in turn, and the better pool gets more."""
    rich_and_poor = list(spending(stage2, 120, share_open=lambda number: 0.05 if number % 2 else 0.5))[40:]
    assert np.mean(rich_and_poor) == pytest.approx(480 if stage2 == "none" else 960, rel=0.15)
    assert np.mean(rich_and_poor[::2]) > 1.5 * np.mean(rich_and_poor[1::2])


@pytest.mark.parametrize("late", [0, 1, 3])
@pytest.mark.parametrize("stage2", ["none", "topup", "price"])
def test_a_price_neither_begins_with_a_spree_nor_starves_when_trees_end_late(stage2, late):
    """A whole run once spent five updates' worth in its second one, and next to nothing in the twenty after it."""
    budget = 480 if stage2 == "none" else 960
    priced = list(spending(stage2, 90, late=late))[late + 1 :]
    assert max(priced) < 3.5 * budget
    eights = [np.mean(priced[start : start + 8]) for start in range(0, 80, 8)]
    assert min(eights) > 0.4 * budget
    assert np.mean(priced[20:]) == pytest.approx(budget, rel=0.2)


def decided_prompt(reward):
    """Two roots that differ; both continuations at the first end as it did: the prefix has decided everything."""
    return make_tree([0, 1, 0, 1, 1], [([1, 2], reward), ([3], 1 - reward), ([4], reward), ([5], reward)])


def open_prompt():
    """Two roots that differ; the continuations after a long prefix differ, too: nothing was decided by it."""
    return make_tree(
        [0, 1, 0, 1, 1], [([1, 2], 1.0), ([3], 0.0), ([4], 1.0), ([5], 0.0)], tokens={1: 9, 2: 1, 4: 1, 5: 1}
    )


def test_auto_stops_where_continuations_do_not_pay_says_why_and_looks_again(caplog):
    config = BudgetConfig(continuations="auto")
    market = Market(config, window=64)
    with caplog.at_level(logging.INFO):
        for number in range(MIN_ANCHORS - 1):
            market.observe(decided_prompt(float(number % 2)))
        assert market.offer().closed_depths == frozenset()
        market.observe(decided_prompt(1.0))
    assert "after turn 1 do not pay: s = 0.50 of a rollout's tokens lie before the fork" in caplog.text
    assert "they pay above 1.00 (ρ = 1.00, 2.0 roots, 2.0 continuations; 16 anchors)" in caplog.text
    offers = [market.offer() for _ in range(2 * PROBE_EVERY)]
    assert sum(offer.closed_depths == frozenset() for offer in offers) == 2
    closed = next(offer for offer in offers if offer.closed_depths)
    counts = stage2_rule(config, closed).spend([anchor(0.5), anchor(0.5, depth=2)], 3, RNG)
    assert counts.tolist() == [0, 3]
    assert stage2_rule(config, closed).spend([anchor(0.5)], 3, RNG).tolist() == [0]
    with caplog.at_level(logging.INFO):
        for _ in range(64):
            market.observe(open_prompt())
    assert "after turn 1 pay again: s = 0." in caplog.text
    found = market.figures()[1]
    assert (found.num_anchors, found.rho, found.share_before) == (64, 0.0, 0.9)
    assert market.offer().closed_depths == frozenset()


def slow(tree, seconds):
    return replace(tree, nodes=tuple(replace(n, seconds=seconds.get(i, 0.0)) for i, n in enumerate(tree.nodes)))


def test_auto_in_seconds_buys_where_a_prefix_is_dear_in_seconds_only(caplog):
    """ρ = .5: every second prompt is decided by the prefix. s is .5 in tokens and .9 in seconds; γ = .5, so

    1.5²/(1 + .5·.5·3/8) = 2.057, as sure as 3.057 roots for the cost of 2 + 4(1 − s): s must be above .736.

    `auto` closes the depth, `auto_seconds` does not, and both say why.
    """
    half_open = make_tree([0, 1, 0, 1, 1], [([1, 2], 1.0), ([3], 0.0), ([4], 1.0), ([5], 0.0)])
    closed = {}
    for how in ("auto", "auto_seconds"):
        market = Market(BudgetConfig(continuations=how))
        caplog.clear()
        with caplog.at_level(logging.INFO):
            for number in range(MIN_ANCHORS):
                tree = half_open if number % 2 else decided_prompt(1.0)
                market.observe(slow(tree, {1: 9.0, 4: 1.0, 5: 1.0}))
        closed[how] = market.offer().closed_depths
        (words,) = market.decisions.values()
        assert caplog.messages == [words]
        assert "they pay above 0.74 (ρ = 0.50, 2.0 roots, 2.0 continuations; 16 anchors)" in words
    assert closed == {"auto": frozenset([1]), "auto_seconds": frozenset()}
    assert words.startswith(
        "continuations after turn 1 pay: s = 0.90 of a rollout's seconds (0.50 of its tokens) lie before the fork"
    )


def test_always_buys_whatever_was_measured():
    market = Market(BudgetConfig())
    for _ in range(64):
        market.observe(decided_prompt(1.0))
    assert market.offer().closed_depths == frozenset()
    assert market.metrics()["stage2/pays/turn_1"] == 0.0


def test_auto_without_a_stage_2_is_refused():
    with pytest.raises(ConfigError, match=r"budget.continuations=auto: budget.stage2=none buys none"):
        BudgetConfig(stage2="none", continuations="auto")
