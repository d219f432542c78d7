"""What each advantage and each aggregation does on average, against the true gradient: every tree is enumerated."""

from dataclasses import replace

import numpy as np
import pytest

from scripts.studies.exact import Process, by_contrast, gradient_estimate, grown_trees, top_up
from trace_async.method.aggregation import normalize_credits
from trace_async.method.credit import compute_credit

AGGREGATIONS = ("constant", "token", "sequence", "prompt")

# Two turns of two actions. Lengths go with outcomes and with actions: 1 token, 2 more for a success, 1 more after 1.
PROCESS = Process(
    chances={(): 0.4, (0,): 0.3, (1,): 0.6},
    success={(0, 0): 0.9, (0, 1): 0.2, (1, 0): 0.5, (1, 1): 0.1},
    length=lambda history, reward: 1 + 2 * int(reward) + history[0] if len(history) == 2 else 1,
)


def expectations(process, advantage, num_roots, rounds=()):
    """E[ĝ] of the product's credit, per aggregation and (None) without one; and what it should be.

    That is ∇V(prompt), if there are two roots to compare, and ∇V(anchor)/m for every group that was bought.
    """
    found = {name: np.zeros(len(process.chances)) for name in (None, *AGGREGATIONS)}
    truth, total = np.zeros(len(process.chances)), 0.0
    for chance, tree in grown_trees(process, num_roots, choose=by_contrast, rounds=rounds):
        plain = compute_credit(advantage, tree)
        for name in found:
            credit = plain if name is None else normalize_credits([tree], [plain], name)[0]
            found[name] += chance * gradient_estimate(process, tree, credit)
        truth += chance * (process.gradient() if num_roots > 1 else 0)
        if advantage != "grpo":
            for anchor, _ in {(r.anchor, r.round) for r in tree.rollouts if r.kind == "continuation"}:
                truth += chance * process.gradient(history_of(tree, anchor)) / num_roots
        total += chance
    assert total == pytest.approx(1)
    return found, truth


def history_of(tree, node):
    return tuple(tree.nodes[index].token_ids[0] for index in tree.path(node)[1:])


def turned_by(found, truth):
    """1 − cosine between the two."""
    return 1 - found @ truth / np.linalg.norm(found) / np.linalg.norm(truth)


def test_the_true_gradient_by_hand():
    assert (PROCESS.value((0,)), PROCESS.value((1,))) == pytest.approx((0.41, 0.34))
    # V(0) = .3·.9 + .7·.2 = .41, V(1) = .6·.5 + .4·.1 = .34; .4·.6·(.41 − .34); .4·.3·.7·(.9 − .2); .6·.6·.4·(.5 − .1)
    assert PROCESS.gradient().tolist() == pytest.approx([0.0168, 0.0588, 0.0576])
    assert PROCESS.gradient((1,)).tolist() == pytest.approx([0, 0, 0.096])


def unbiased(found, truth):
    return {name for name in AGGREGATIONS if turned_by(found[name], truth) < 1e-9}


@pytest.mark.parametrize("advantage", ["trace", "trace_fresh", "grpo", "gigpo", "tree_grpo", "tree_rpo"])
def test_of_two_root_rollouts_only_the_constant_divisor_is_unbiased(advantage):
    """Two rollouts that disagree always have the same mean and deviation, so dividing by it is only a factor."""
    assert unbiased(*expectations(PROCESS, advantage, 2)) == {"constant"}


def test_whitening_over_tokens_is_biased_by_any_divisor():
    assert unbiased(*expectations(PROCESS, "treepo", 2)) == set()


def test_comparing_turns_of_one_state_weighs_states_by_how_often_rollouts_meet_there():
    """Two rollouts compared give ½ of the true slope. The prompt's comparison is always of two; that of a state is of
    two if the other came there as well: always at the first turn, then with .4 and with .6. So ½ + ½ · (1, .4, .6).
    """
    process = replace(PROCESS, says=lambda history: (7, *history))
    found, truth = expectations(process, "gigpo", 2)
    assert found[None] == pytest.approx(truth * [1.0, 0.7, 0.8])
    assert unbiased(found, truth) == set()


@pytest.mark.parametrize(
    ("advantage", "even", "hard"),
    # trace 1 for all, grpo (m − 1)/m. With a deviation Σ_k Binomial(k)·[k(1 − k/4)/V + (4 − k)(k/4)/(1 − V)]/4/std_k:
    [("trace", 1.0, 1.0), ("grpo", 0.75, 0.75), ("tree_rpo", 1.3995, 1.4560)],
)
def test_dividing_by_the_deviation_weighs_prompts_by_their_difficulty(advantage, even, hard):
    """Inside one prompt any function of the outcomes points along ∇V; between prompts the factor is the bias."""
    for value, factor in ((0.5, even), (0.125, hard)):
        process = Process(chances={(): 0.5}, success={(0,): value + 0.1, (1,): value - 0.1})
        found, truth = expectations(process, advantage, 4)
        assert found[None] == pytest.approx(factor * truth, rel=1e-3)


@pytest.mark.parametrize(("num_roots", "rounds"), [(2, (2,)), (2, (1, 1)), (1, (2, 1))])
@pytest.mark.parametrize(
    ("advantage", "expected"),
    [("trace", {"constant"}), ("trace_fresh", {"constant"}), ("tree_grpo", set()), ("tree_rpo", set())],
)
def test_with_continuations_by_contrast_only_ours_are_unbiased(advantage, expected, num_roots, rounds):
    """The rollout that passed was picked for its outcome: whoever pools it with the continuations is biased."""
    assert unbiased(*expectations(PROCESS, advantage, num_roots, rounds)) == expected


@pytest.mark.parametrize("advantage", ["trace", "trace_fresh"])
@pytest.mark.parametrize("rounds", [(), (2,), (1, 1)])
def test_ours_has_the_true_gradient_itself_as_its_mean(advantage, rounds):
    found, truth = expectations(PROCESS, advantage, 2, rounds)
    assert found[None] == pytest.approx(truth, abs=1e-12)


@pytest.mark.parametrize("advantage", ["trace", "trace_fresh"])
@pytest.mark.parametrize(("values", "chance", "again"), [((0.6, 0.4), 0.6, 0.36), ((0.9, 0.1), 0.9, 0.81)])
def test_two_rounds_of_stage_2_are_two_unbiased_groups(advantage, values, chance, again):
    """Turn 1 is forced, then a or b with ½, then the end: round 1 comes to turn 1 with `chance`, round 2 with `again`.

    With both rounds pooled into one group of weight 1, the mean was −.006 for .030 and .15975 for .18.
    """
    a, b = values
    process = Process(chances={(): 1.0, (0,): 0.5, (0, 0): 1.0, (0, 1): 1.0}, success={(0, 0, 0): a, (0, 1, 0): b})
    slope = 0.25 * (a - b)
    # One round of two spends one on turn 1 whatever came out.
    one, _ = expectations(process, advantage, 1, (2,))
    assert one[None][1] == pytest.approx(slope)
    two, truth = expectations(process, advantage, 1, (1, 1))
    assert two[None][1] == pytest.approx((chance + again) * slope)
    # A lone root has no root term, so all of it is the branch term's.
    assert two[None] == pytest.approx(truth)


@pytest.mark.parametrize("advantage", ["trace", "trace_fresh"])
@pytest.mark.parametrize("rounds", [(3,), (1, 1)])
def test_further_roots_of_a_prompt_whose_roots_agree_add_unbiased_groups(advantage, rounds):
    """V = .5: two roots agree with ½. Three more weigh 1/5 each; or one weighs 1/3 and, if it agrees (½), the next 1/4.

    Pooled with the first two, as GRPO does, they would be biased: that they came says how the first ones ended.
    """
    process = Process(chances={(): 0.5}, success={(0,): 0.6, (1,): 0.4})
    found, agreed = np.zeros(1), 0.0
    for chance, tree in grown_trees(process, 2, choose=top_up, rounds=rounds):
        found += chance * gradient_estimate(process, tree, compute_credit(advantage, tree))
        agreed += chance * (len(tree.rollouts) > 2)
    assert agreed == pytest.approx(0.5)
    further = 0.5 * 3 / 5 if rounds == (3,) else 0.5 / 3 + 0.25 / 4
    assert found == pytest.approx((1 + further) * process.gradient())


@pytest.mark.parametrize(("longer", "value"), [("success", 0.55), ("failure", 0.45)])
def test_dividing_by_a_trees_own_tokens_turns_the_gradients_sign(longer, value):
    """Action a: its longer ending writes 30 tokens, the other 10; b: 20 tokens, V = .5. Four root rollouts."""

    def length(history, reward):
        return 20 if history == (1,) else 30 if bool(reward) == (longer == "success") else 10

    process = Process(chances={(): 0.5}, success={(0,): value, (1,): 0.5}, length=length)
    right = 0.25 * (value - 0.5)
    found, truth = expectations(process, "trace", 4)
    assert truth.tolist() == pytest.approx([right])
    # 20.5: the mean length of a rollout, so that the two can be compared.
    assert found["prompt"][0] * 20.5 == pytest.approx(-0.0036 if longer == "success" else 0.0036, abs=5e-5)
    assert found["constant"][0] * 64 == pytest.approx(right)


def test_the_bias_of_token_falls_with_the_number_of_prompts():
    """As above; prompts with the same outcomes are drawn alike, so a batch of n is a multinomial draw of trees."""
    process = Process(
        chances={(): 0.5},
        success={(0,): 0.55, (1,): 0.5},
        length=lambda history, reward: 20 if history == (1,) else 30 if reward else 10,
    )
    trees = list(grown_trees(process, 2))
    chances = np.array([chance for chance, _ in trees])
    credits = [compute_credit("trace", tree) for _, tree in trees]
    slopes = np.array([gradient_estimate(process, t, c)[0] for (_, t), c in zip(trees, credits, strict=True)])
    tokens = np.array(
        [(c.weight * [n.num_generated for n in t.nodes]).sum() for (_, t), c in zip(trees, credits, strict=True)]
    )
    rng = np.random.default_rng(0)
    wrong = []
    for size in (1, 64):
        counts = rng.multinomial(size, chances / chances.sum(), size=40_000)
        ratio = (counts @ slopes) / (counts @ tokens)
        wrong.append(abs(ratio.mean() * 20.5 - 0.0125))
        error = ratio.std() / len(ratio) ** 0.5 * 20.5
    assert wrong[0] > 10 * wrong[1]
    assert wrong[1] < 1e-3 + 4 * error
