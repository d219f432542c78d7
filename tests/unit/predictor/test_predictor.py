"""The value model on small Qwen3 trunks with random weights, and on token trees whose true values are known."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from actors.predictors.predictor import PredictorActor
from trace_async.config import Config, PredictorConfig
from trace_async.predictor.predictor import ValuePredictor
from trace_async.predictor.targets import backed_up_targets
from trace_async.trees.tree import Node, Rollout, RolloutTree
from trace_async.types import PrefixQuery, Task, VersionSpan

VOCAB = 40


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=64,
        tie_word_embeddings=True,
    )
    path = tmp_path_factory.mktemp("policy")
    Qwen3ForCausalLM(config).save_pretrained(path)
    return path


def turn(parent, rollout, tokens):
    n = len(tokens) - 1
    return Node(
        parent=parent,
        rollout=rollout,
        token_ids=tuple(tokens),
        num_generated=n,
        logprobs=(-1.0,) * n,
        version_spans=(VersionSpan(0, 0),) if n else (),
    )


def make_tree(prompt, rollouts, task_id="t"):
    """`rollouts`: (anchor node, turns as token lists, reward), in order; a turn's last token is its observation."""
    nodes = [Node(parent=-1, rollout=-1, token_ids=tuple(prompt), num_generated=0)]
    made = []
    for index, (anchor, turns, reward) in enumerate(rollouts):
        parent = anchor
        for tokens in turns:
            nodes.append(turn(parent, index, tokens))
            parent = len(nodes) - 1
        made.append(
            Rollout(kind="root" if anchor == 0 else "continuation", anchor=anchor, leaf=parent, reward=float(reward))
        )
    task = Task(id=task_id, domain="d", kind="k", data={})
    return RolloutTree(task=task, nodes=tuple(nodes), rollouts=tuple(made))


def branched():
    return make_tree(
        [1, 2, 3],
        [
            (0, [[4, 5], [6, 7, 8], [9, 10]], 1),
            (0, [[11, 12], [13, 14]], 0),
            (1, [[15, 16, 17]], 0),
            (2, [[18, 19], [20, 21]], 1),
        ],
    )


def test_targets_are_mean_rewards_of_the_leaves_below():
    targets, weights = backed_up_targets(branched())
    # leaves below: prompt 1 0 0 1; node 1: 1 0 1; node 2: 1 1; 3: 1; 4, 5: 0; 6: 0; 7, 8: 1
    assert targets == pytest.approx([0.5, 2 / 3, 1, 1, 0, 0, 0, 1, 1])
    assert weights.tolist() == [4, 3, 2, 1, 1, 1, 1, 1, 1]


def test_weights_undo_selection_by_outcome():
    """METHOD section 2: only failures are expanded, K = 2, V = .5. Unweighted targets mean .667, weighted .5."""
    rng = np.random.default_rng(0)
    targets, weights = [], []
    for _ in range(20_000):
        passed = rng.integers(2)
        leaves = [passed] if passed else [passed, *rng.integers(2, size=2)]
        rollouts = [(0, [[1, 2], [3, 4]], leaves[0]), *((1, [[3, 4]], reward) for reward in leaves[1:])]
        target, weight = backed_up_targets(make_tree([1], rollouts))
        targets.append(target[1])
        weights.append(weight[1])
    assert np.mean(targets) == pytest.approx(2 / 3, abs=0.01)
    assert np.average(targets, weights=weights) == pytest.approx(0.5, abs=0.01)


def train_a_little(predictor):
    tree = branched()
    for _ in range(3):
        predictor.train_step([tree])


@pytest.mark.parametrize("num_layers", [0, 1])
def test_one_forward_over_a_tree_gives_what_each_history_alone_gives(policy, num_layers):
    predictor = ValuePredictor(PredictorConfig(num_layers=num_layers, learning_rate=0.01), policy, seed=0)
    train_a_little(predictor)
    trees = [branched(), make_tree([7, 7], [(0, [[1, 2]], 1)])]
    together = predictor.tree_values(trees)
    for tree, values in zip(trees, together, strict=True):
        for node in range(len(tree.nodes)):
            tokens = tree.prefix_tokens(node)
            if node and not tree.children[node]:
                assert np.isnan(values[node])
                continue
            (alone,) = predictor.predict([PrefixQuery(token_ids=tokens, positions=(len(tokens),))])
            assert values[node] == pytest.approx(alone[0], abs=1e-5)
    # and one forward over a rollout gives all its prefixes
    tokens = trees[0].prefix_tokens(3)
    queries = [PrefixQuery(token_ids=(9,), positions=(1,)), PrefixQuery(token_ids=tokens, positions=(3, 5, 8, 10))]
    assert predictor.predict(queries)[1][:3] == pytest.approx(together[0][:3], abs=1e-5)
    assert predictor.predict([]) == []
    assert len(set(np.round(together[0][:4], 6))) == 4  # it does look at the tokens


def world(rng, count):
    """Prompts [kind]; V = .9, .1 or .5 by kind. A turn of an even prompt shows token 30 (V → .9) or 31 (V → .1)."""
    trees = []
    for number in range(count):
        kind = int(rng.integers(3))
        rollouts = []
        for _ in range(3):
            good = bool(rng.integers(2)) if kind == 2 else kind == 0
            reward = rng.random() < (0.9 if good else 0.1)
            sign = (30 if good else 31) if kind == 2 else 32
            rollouts.append((0, [[5, sign], [6, 7]], reward))
        trees.append(make_tree([20 + kind, int(rng.integers(8, 20))], rollouts, task_id=str(number)))
    return trees


@pytest.mark.parametrize("loss", ["bce", "mse"])
def test_it_learns_values_online(policy, loss):
    rng = np.random.default_rng(0)
    config = PredictorConfig(learning_rate=3e-3, loss=loss, steps_per_update=4, trees_per_step=32, warmup_steps=4)
    predictor = ValuePredictor(config, policy, seed=0)
    first = predictor.train(world(rng, 32), 0)
    for version in range(1, 16):
        last = predictor.train(world(rng, 32), version)
    assert first["brier"] == pytest.approx(0.25, abs=1e-6)  # an untrained head says one half
    # by law: depth 0 var = (.09 + .09 + .25)/3 = .143
    assert last["brier/depth_0"] < 0.2 < last["brier_base"]
    assert last["auc/depth_0"] > 0.75
    assert "brier/depth_1" not in last  # Stage 2 did not ask
    values = [predictor.predict([PrefixQuery(token_ids=(20 + kind, 9), positions=(2,))])[0][0] for kind in range(3)]
    assert values == pytest.approx([0.9, 0.1, 0.5], abs=0.25)
    (signs,) = predictor.predict([PrefixQuery(token_ids=(22, 9, 5, 30), positions=(2, 4))])
    assert signs[1] > 0.75


def test_estimates_mix_values_and_counts(policy):
    predictor = ValuePredictor(PredictorConfig(prior_strength=2.0, fit_prior_strength=False), policy, seed=0)
    predictor.observe([make_tree([1, 2], [(0, [[3, 4]], 1), (0, [[3, 5]], 1)], task_id="seen")], 0)
    query = PrefixQuery(token_ids=(1, 2), positions=(2,))
    found = predictor.estimate(["seen", "new"], [query, query])
    assert found.a.tolist() == pytest.approx([3, 1])
    assert found.b.tolist() == pytest.approx([1, 1])


def test_turns_are_judged_by_what_stage_2_was_told(policy):
    predictor = ValuePredictor(PredictorConfig(), policy, seed=0)
    tree = branched()
    nodes = [replace(node, value=0.9 if index in (1, 2) else node.value) for index, node in enumerate(tree.nodes)]
    metrics = predictor.observe([replace(tree, nodes=tuple(nodes))], 0)
    # root rollouts 1-2-3 ✓ and 4-5 ✗; turns 1 and 2 were asked for
    assert metrics["brier/depth_1"] == pytest.approx(0.01)
    assert metrics["brier/depth_2"] == pytest.approx(0.01)
    assert metrics["brier/depth_0"] == pytest.approx(0.25)


def test_resumed_it_goes_on_as_if_never_stopped(policy, tmp_path):
    rng = np.random.default_rng(0)
    config = PredictorConfig(learning_rate=3e-3, steps_per_update=2, trees_per_step=8)
    one = ValuePredictor(config, policy, seed=3)
    one.train(world(rng, 12), 0)
    one.train(world(rng, 12), 1)
    one.save(tmp_path / "predictor")
    other = ValuePredictor(config, policy, seed=99)
    other.load(tmp_path / "predictor")
    more = world(rng, 12)
    went_on, resumed = one.train(more, 2), other.train(more, 2)
    assert went_on == pytest.approx(resumed, abs=1e-7)
    assert one.tree_values(more)[0] == pytest.approx(other.tree_values(more)[0], abs=1e-7, nan_ok=True)
    query = PrefixQuery(token_ids=(20, 9), positions=(2,))
    ours, theirs = one.estimate(["5"], [query]), other.estimate(["5"], [query])
    assert (ours.a, ours.b) == (pytest.approx(theirs.a), pytest.approx(theirs.b))


def recorded_steps(predictor, new):
    """What the steps of one update are given: (is it a prompt step, its trees)."""
    seen = []
    predictor.train_prompt_step = lambda trees: seen.append((True, trees)) or 0.0
    predictor.train_step = lambda trees: seen.append((False, trees)) or 0.0
    for step in predictor.steps(new):
        step()
    return seen


def test_new_trees_come_first_and_replay_fills_up(policy):
    config = PredictorConfig(steps_per_update=2, trees_per_step=8, prompt_steps_per_update=1, warmup_steps=0)
    predictor = ValuePredictor(replace(config, prompt_tokens_per_step=25), policy, seed=0)
    old, new = world(np.random.default_rng(0), 20), world(np.random.default_rng(1), 10)
    predictor.observe(old, 0)
    predictor.observe(new, 1)
    (_, first), (_, second), (is_prompts, prompts) = recorded_steps(predictor, new)
    assert is_prompts
    assert len(set(map(id, prompts))) == 12
    assert first == new[:8]
    assert second[:2] == new[8:]
    assert len(second) == 8
    assert all(any(tree is known for known in [*old, *new]) for tree in second)


def test_extra_prompt_steps_fade(policy):
    config = PredictorConfig(prompt_steps_per_update=1, warmup_steps=5, steps_per_update=1)
    predictor = ValuePredictor(config, policy, seed=0)
    assert recorded_steps(predictor, []) == []  # nothing to learn from yet
    predictor.observe(world(np.random.default_rng(0), 4), 0)
    counts = [sum(is_prompts for is_prompts, _ in recorded_steps(predictor, [])) for _ in range(5)]
    assert counts == [6, 3, 2, 1, 1]
    still = ValuePredictor(PredictorConfig(steps_per_update=0), policy, seed=0)
    still.observe(world(np.random.default_rng(0), 4), 0)
    assert recorded_steps(still, []) == []


def test_small_portions_change_nothing_but_memory(policy):
    trees = [branched(), *world(np.random.default_rng(0), 5)]
    whole = ValuePredictor(PredictorConfig(learning_rate=0.01), policy, seed=0)
    cut = ValuePredictor(PredictorConfig(learning_rate=0.01, max_tokens_per_forward=30), policy, seed=0)
    for predictor in (whole, cut):
        train_a_little(predictor)
    for step in ("train_step", "train_prompt_step"):
        assert getattr(whole, step)(trees) == pytest.approx(getattr(cut, step)(trees), abs=1e-6)
    for one, other in zip(whole.tree_values(trees), cut.tree_values(trees), strict=True):
        assert one == pytest.approx(other, abs=1e-4, nan_ok=True)
    queries = [PrefixQuery(token_ids=tree.prefix_tokens(2), positions=(2, 3)) for tree in trees]
    for one, other in zip(whole.predict(queries), cut.predict(queries), strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_a_prompt_step_learns_from_root_rollouts_alone(policy):
    """One root rollout fails, its continuations succeed: the prompt's value must fall, the turn's may rise."""
    predictor = ValuePredictor(PredictorConfig(learning_rate=0.01), policy, seed=0)
    tree = make_tree([1, 2], [(0, [[3, 4], [5, 6]], 0), (1, [[7, 8]], 1), (1, [[9, 8]], 1)])
    for _ in range(20):
        predictor.train_prompt_step([tree])
    assert predictor.tree_values([tree])[0][0] < 0.2
    for _ in range(40):
        predictor.train_step([tree])
    assert predictor.tree_values([tree])[0][1] == pytest.approx(2 / 3, abs=0.1)


def test_trees_whose_rollouts_all_broke_down_teach_nothing(policy):
    predictor = ValuePredictor(PredictorConfig(), policy, seed=0)
    nothing = RolloutTree(
        task=branched().task, nodes=branched().nodes[:1], rollouts=(), failures={"EngineDeadError": 2}
    )
    metrics = predictor.train([nothing], 0)
    assert "brier" not in metrics
    assert "loss" not in metrics


async def test_actor_answers_while_it_trains_and_in_one_forward(policy):
    config = Config()
    config = replace(config, predictor=replace(config.predictor, trunk="own", steps_per_update=6, trees_per_step=16))
    actor = PredictorActor(config, str(policy))
    forwards = []
    predict = actor.predictor.predict
    actor.predictor.predict = lambda queries: forwards.append(len(queries)) or predict(queries)
    query = PrefixQuery(token_ids=(1, 2, 3), positions=(1, 3))
    both = await asyncio.gather(actor.values([query]), actor.values([query, query]))
    assert [len(answers) for answers in both] == [1, 2]
    assert forwards == [3]
    training = asyncio.create_task(actor.train(world(np.random.default_rng(0), 16), 0))
    await asyncio.sleep(0)
    answered = await actor.values([query])
    assert not training.done()
    assert answered[0].shape == (2,)
    metrics = await training
    assert {"predictor/brier", "predictor/auc", "predictor/loss", "predictor/busy_s"} <= metrics.keys()
    assert metrics["predictor/busy_s"] > 0
    estimates = await actor.estimate(["a"], [query])
    assert estimates.mean.shape == (1,)


async def test_a_cancelled_question_does_not_harm_the_others(policy):
    actor = PredictorActor(Config(), str(policy))
    query = PrefixQuery(token_ids=(1, 2, 3), positions=(3,))
    one, other = asyncio.create_task(actor.values([query])), asyncio.create_task(actor.values([query]))
    await asyncio.sleep(0)
    one.cancel()
    assert (await other)[0].shape == (1,)
    # a question that cannot be answered is an error for those who asked, and the next one is answered
    with pytest.raises(IndexError):
        await actor.values([PrefixQuery(token_ids=(VOCAB + 5,), positions=(1,))])
    assert (await actor.values([query]))[0].shape == (1,)
