"""Advantages on trees small enough to work out by hand; the numbers in the comments are the working."""

from dataclasses import replace

import numpy as np
import pytest

from trace_async.method.credit import compute_credit, compute_credits
from trace_async.trees.tree import Node, Rollout, RolloutKind, RolloutTree
from trace_async.types import Task, VersionSpan

TASK = Task(id="t", domain="d", kind="k", data={})


def make_tree(parents, rollouts, tokens=None):
    """`parents` of nodes 1, 2, …; `rollouts`: (nodes it wrote, reward); one generated token a node unless told."""
    owner = {node: index for index, (nodes, _) in enumerate(rollouts) for node in nodes}
    nodes = [Node(parent=-1, rollout=-1, token_ids=(1,), num_generated=0)]
    for node, parent in enumerate(parents, start=1):
        n = (tokens or {}).get(node, 1)
        nodes.append(
            Node(
                parent=parent,
                rollout=owner[node],
                token_ids=(2,) * n + (3,),
                num_generated=n,
                logprobs=(-1.0,) * n,
                version_spans=(VersionSpan(0, 0),) if n else (),
            )
        )
    made = []
    for written, reward in rollouts:
        anchor = nodes[written[0]].parent
        kind: RolloutKind = "root" if anchor == 0 else "continuation"
        made.append(Rollout(kind=kind, anchor=anchor, leaf=written[-1], reward=reward))
    return RolloutTree(task=TASK, nodes=tuple(nodes), rollouts=tuple(made))


def example():
    """Roots 1-2-3 ✓ and 4-5 ✗; at node 1 two continuations, 6-7 ✗ and 8 ✓; at node 4 one, 9 ✓.

    prompt ─┬─ 1 ─┬─ 2 ─ 3 ✓
            │     ├─ 6 ─ 7 ✗
            │     └─ 8 ✓
            └─ 4 ─┬─ 5 ✗
                  └─ 9 ✓
    """
    return make_tree(
        [0, 1, 2, 0, 4, 1, 6, 1, 4],
        [([1, 2, 3], 1.0), ([4, 5], 0.0), ([6, 7], 0.0), ([8], 1.0), ([9], 1.0)],
    )


def credit_of(name, tree, **options):
    credit = compute_credit(name, tree, **options)
    return credit.positive, credit.negative, credit.weight


def test_trace_by_hand():
    positive, negative, weight = credit_of("trace", example())
    # roots: 1 − 0 = 1 and 0 − 1 = −1, weight 1/2. At node 1 the outcomes are (✓ passed, ✗, ✓): for 6-7
    # 0 − (1 + 1)/2 = −1, for 8 1 − (1 + 0)/2 = 1/2, weight 1/(2·2). At node 4 (✗ passed, ✓): 1 − 0 = 1, weight 1/(2·1).
    assert positive.tolist() == [0, 0.5, 0.5, 0.5, 0, 0, 0, 0, 0.125, 0.5]
    assert negative.tolist() == [0, 0, 0, 0, -0.5, -0.5, -0.25, -0.25, 0, 0]
    assert weight.tolist() == [0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.5]


def test_trace_with_std_by_hand():
    positive, negative, _ = credit_of("trace", example(), normalize_std=True)
    # std (n − 1) of (1, 0): .7071; of (1, 0, 1): .5774
    assert positive[[1, 8, 9]] == pytest.approx([0.5 / 0.70711, 0.125 / 0.57735, 0.5 / 0.70711], rel=1e-4)
    assert negative[[4, 6]] == pytest.approx([-0.5 / 0.70711, -0.25 / 0.57735], rel=1e-4)


def test_grpo_by_hand():
    positive, negative, weight = credit_of("grpo", example())
    # mean .5; continuations are not trained on
    assert positive.tolist() == [0, 0.25, 0.25, 0.25, 0, 0, 0, 0, 0, 0]
    assert negative.tolist() == [0, 0, 0, 0, -0.25, -0.25, 0, 0, 0, 0]
    assert weight.tolist() == [0, 0.5, 0.5, 0.5, 0.5, 0.5, 0, 0, 0, 0]
    positive, _, _ = credit_of("grpo", example(), normalize_std=True)
    assert positive[1] == pytest.approx(0.25 / (0.70711 + 1e-6), rel=1e-4)


def test_tree_grpo_by_hand():
    positive, negative, weight = credit_of("tree_grpo", example())
    # prompt: rewards 1 0 0 1 1, mean .6, std .5477: ✓ .7303, ✗ −1.0954
    # tree of node 1: 1 0 1, mean 2/3, std .5774: ✓ .5774, ✗ −1.1547; tree of node 4: 0 1, std .7071: ±.7071
    good, bad = 0.7303 + 0.5774, -1.0954 - 1.1547
    good4, bad4 = 0.7303 + 0.7071, -1.0954 - 0.7071
    assert positive[[2, 3, 8]] == pytest.approx([good / 5] * 3, abs=1e-4)
    assert negative[[6, 7]] == pytest.approx([bad / 5] * 2, abs=1e-4)
    # shared turns are trained once per leaf below them
    assert (positive[1], negative[1], weight[1]) == pytest.approx((2 * good / 5, bad / 5, 3 / 5), abs=1e-4)
    assert (positive[4], negative[4], weight[4]) == pytest.approx((good4 / 5, bad4 / 5, 2 / 5), abs=1e-4)
    assert (positive[9], negative[5]) == pytest.approx((good4 / 5, bad4 / 5), abs=1e-4)


def test_tree_grpo_lone_leaf_has_mean_0_and_std_1():
    positive, _, weight = credit_of("tree_grpo", make_tree([0], [([1], 1.0)]))
    assert positive[1] == pytest.approx(2.0, abs=1e-5)  # alone in its tree and in its prompt
    assert weight[1] == 1
    positive, negative, _ = credit_of("tree_grpo", make_tree([0, 0], [([1], 1.0), ([2], 0.0)]))
    # tree: 1 and 0; prompt ±.7071; halved
    assert positive[1] == pytest.approx((1 + 0.70711) / 2, abs=1e-5)
    assert negative[2] == pytest.approx(-0.70711 / 2, abs=1e-5)


def test_shared_prefix_is_trained_once_by_trace_and_per_leaf_by_tree_grpo():
    tree = make_tree([0, 1, 0, 1, 1], [([1, 2], 0.0), ([3], 1.0), ([4], 1.0), ([5], 1.0)])
    trace = compute_credit("trace", tree)
    pooled = compute_credit("tree_grpo", tree)
    # the failure that passed at node 1, once; the two successes there train only their own suffix
    assert (trace.positive[1], trace.negative[1], trace.weight[1]) == (0, -0.5, 0.5)
    # one ✗ and two ✓ of four leaves
    assert pooled.weight[1] == pytest.approx(3 / 4)
    assert pooled.positive[1] > 0 > pooled.negative[1]


def test_treepo_by_hand():
    tree = example()
    # means of leaves: prompt 3/5, node 1 2/3, node 4 1/2; leaves 3, 7, 8 average over prompt and node 1, 5 and 9 over
    # prompt and node 4: ✓ at 1: (.4 + .3333)/2 = .36667, ✗ (−.6 − .66667)/2 = −.63333; at 4: ✓ .45, ✗ −.55
    raw = np.array([0.36667, -0.55, -0.63333, 0.36667, 0.45])
    tokens = np.array([3, 2, 3, 2, 2])  # of the paths 1-2-3, 4-5, 1-6-7, 1-8, 4-9
    mean = (raw * tokens).sum() / 12
    std = np.sqrt((tokens * (raw - mean) ** 2).sum() / 12)
    white = (raw - mean) / std
    positive, negative, weight = credit_of("treepo", tree)
    assert positive[[3, 8, 9]] == pytest.approx(white[[0, 3, 4]] / 5, abs=1e-4)
    assert negative[[5, 7]] == pytest.approx(white[[1, 2]] / 5, abs=1e-4)
    assert (positive[1], negative[1]) == pytest.approx(((white[0] + white[3]) / 5, white[2] / 5), abs=1e-4)
    assert weight[1] == pytest.approx(0.6)


def test_treepo_whitens_over_the_batch():
    mixed = make_tree([0, 0], [([1], 1.0), ([2], 0.0)])
    alike = make_tree([0, 0], [([1], 1.0), ([2], 1.0)])
    alone = compute_credits("treepo", [mixed])[0]
    both = compute_credits("treepo", [mixed, alike])
    # ±.5 alone: std .5; with two zeros beside them: std sqrt(.5/4) = .35355
    assert alone.positive[1] == pytest.approx(1 / 2, abs=1e-6)
    assert both[0].positive[1] == pytest.approx(0.5 / 0.353553 / 2, abs=1e-5)
    assert both[1].positive.tolist() == [0, 0, 0]
    assert compute_credits("treepo", []) == []


def test_gigpo_by_hand():
    """Roots 1-2 ✓, 3-4 ✗, 5-6 ✗. After turns 1 and 3 the environment says the same (3), after 5 something else (7).

    Prompt: 1 − ⅓ = ⅔, −⅓, −⅓. First turns all begin at the prompt, so as much again. Turns 2 and 4 share a state:
    1 − ½ and 0 − ½; turn 6 is alone in its own.
    """
    tree = make_tree([0, 1, 0, 3, 0, 5], [([1, 2], 1.0), ([3, 4], 0.0), ([5, 6], 0.0)])
    nodes = list(tree.nodes)
    nodes[5] = replace(nodes[5], token_ids=(2, 7))
    positive, negative, weight = credit_of("gigpo", replace(tree, nodes=tuple(nodes)))
    a = np.array([0, 4 / 3, 2 / 3 + 1 / 2, -2 / 3, -1 / 3 - 1 / 2, -2 / 3, -1 / 3])
    assert positive == pytest.approx(np.maximum(a, 0) / 3)
    assert negative == pytest.approx(np.minimum(a, 0) / 3)
    assert weight == pytest.approx([0, *[1 / 3] * 6])
    # The two that differ in the shared state have the deviation √½, the three of the prompt √⅓.
    positive, _, _ = credit_of("gigpo", replace(tree, nodes=tuple(nodes)), normalize_std=True)
    assert positive[2] == pytest.approx((2 / 3 / (1 / 3) ** 0.5 + 0.5 / 0.5**0.5) / 3, rel=1e-5)


def test_tree_rpo_by_hand():
    positive, negative, weight = credit_of("tree_rpo", example())
    # values: node 1 mean(1, 0, 1) = 2/3, node 4 mean(0, 1) = 1/2; siblings 1, 4: mean .58333, std .11785: ±.7071
    assert positive[1] == pytest.approx(0.70711 * 3 / 5, abs=1e-4)
    assert negative[4] == pytest.approx(-0.70711 * 2 / 5, abs=1e-4)
    # siblings 2, 6, 8: 1, 0, 1: .5774, −1.1547, .5774, and only children 3, 7 share their parent's
    assert positive[[2, 3, 8]] == pytest.approx([0.57735 / 5] * 3, abs=1e-4)
    assert negative[[6, 7]] == pytest.approx([-1.1547 / 5] * 2, abs=1e-4)
    assert (positive[9], negative[5]) == pytest.approx((0.70711 / 5, -0.70711 / 5), abs=1e-4)
    assert weight.tolist() == pytest.approx([0, 0.6, 0.2, 0.2, 0.4, 0.2, 0.2, 0.2, 0.2, 0.2])


@pytest.mark.parametrize("name", ["trace", "grpo", "gigpo", "treepo", "tree_rpo"])
def test_what_agrees_teaches_nothing(name):
    tree = make_tree([0, 1, 0, 1], [([1, 2], 1.0), ([3], 1.0), ([4], 1.0)])
    positive, negative, _ = credit_of(name, tree)
    assert not positive.any()
    assert not negative.any()


@pytest.mark.parametrize("name", ["trace", "grpo", "gigpo", "tree_grpo", "treepo", "tree_rpo"])
def test_turns_without_generated_tokens_get_no_credit(name):
    tree = make_tree([0, 1, 0], [([1, 2], 1.0), ([3], 0.0)], tokens={2: 0})
    positive, negative, weight = credit_of(name, tree)
    assert (positive[2], negative[2], weight[2]) == (0, 0, 0)
    assert positive[1] > 0


@pytest.mark.parametrize("name", ["trace", "grpo", "gigpo", "tree_grpo", "treepo", "tree_rpo"])
def test_one_lone_rollout_or_none(name):
    alone = compute_credit(name, make_tree([0], [([1], 0.0)]))
    assert alone.positive[1] == alone.negative[1] == 0
    nothing = RolloutTree(task=TASK, nodes=make_tree([0], [([1], 0.0)]).nodes[:1], rollouts=())
    assert compute_credit(name, nothing).weight.tolist() == [0]


def test_trace_at_nested_anchors_compares_with_the_rollout_that_passed_there():
    """Stage 2 in rounds: node 3 was written by continuation 3-4 ✓, and continued by 5 ✗."""
    tree = make_tree([0, 1, 1, 3, 3], [([1, 2], 0.0), ([3, 4], 1.0), ([5], 0.0)])
    positive, negative, weight = credit_of("trace", tree)
    assert positive.tolist() == [0, 0, 0, 1, 1, 0]  # at node 1: 1 − 0, weight 1/(1·1)
    assert negative.tolist() == [0, 0, 0, 0, 0, -1]  # at node 3: 0 − 1
    assert weight.tolist() == [0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("reward", [0.1, 0.7, 1 / 3])
@pytest.mark.parametrize("name", ["trace", "trace_fresh", "grpo", "gigpo", "treepo", "tree_rpo"])
def test_equal_rewards_of_any_size_give_exactly_no_credit(name, reward):
    """The mean of three times .1 is .10000000000000002, and a credit of −4.6e-18 would count as an update."""
    trees = [
        make_tree([0, 0, 0], [([1], reward), ([2], reward), ([3], reward)]),
        make_tree([0, 1, 0, 1, 1], [([1, 2], reward), ([3], reward), ([4], reward), ([5], reward)]),
    ]
    for credit in compute_credits(name, trees):
        assert not credit.positive.any()
        assert not credit.negative.any()


def test_treepo_takes_a_batch_in_which_nothing_was_generated():
    silent = make_tree([0, 0], [([1], 1.0), ([2], 0.0)], tokens={1: 0, 2: 0})
    assert compute_credit("treepo", silent).weight.tolist() == [0, 0, 0]
    assert compute_credit("treepo", make_tree([0], [([1], 1.0)])).positive.tolist() == [0, 0]


def in_rounds(tree, *rounds):
    return replace(tree, rollouts=tuple(replace(r, round=n) for r, n in zip(tree.rollouts, rounds, strict=True)))


def test_trace_credits_a_continuation_with_what_was_known_when_it_was_bought():
    # Root 1-2 ✗; at node 1: 3 ✓ and 4 ✗ in round 0, 5 ✓ in round 1.
    tree = in_rounds(make_tree([0, 1, 1, 1, 1], [([1, 2], 0.0), ([3], 1.0), ([4], 0.0), ([5], 1.0)]), 0, 0, 0, 1)
    credit = compute_credit("trace", tree)
    # 3: 1 − (0 + 0)/2, weight 1/2; 4: 0 − (0 + 1)/2, weight 1/2; 5: 1 − (0 + 1 + 0)/3, weight 1
    assert credit.positive.tolist() == pytest.approx([0, 0, 0, 0.5, 0, 2 / 3])
    assert credit.negative.tolist() == pytest.approx([0, 0, 0, 0, -0.25, 0])
    assert credit.weight.tolist() == [0, 1, 1, 0.5, 0.5, 1]


def test_trace_fresh_leaves_out_the_rollout_that_passed_where_it_can():
    tree = in_rounds(make_tree([0, 1, 1, 1, 1], [([1, 2], 0.0), ([3], 1.0), ([4], 0.0), ([5], 1.0)]), 0, 0, 0, 1)
    credit = compute_credit("trace_fresh", tree)
    # 3: 1 − 0, 4: 0 − 1, 5: 1 − (1 + 0)/2
    assert credit.positive.tolist() == [0, 0, 0, 0.5, 0, 0.5]
    assert credit.negative.tolist() == [0, 0, 0, 0, -0.5, 0]
    alone = compute_credit("trace_fresh", make_tree([0, 1, 1], [([1, 2], 0.0), ([3], 1.0)]))
    assert alone.positive.tolist() == [0, 0, 0, 1]
