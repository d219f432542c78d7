"""V(H) from the policy's own states: the head by hand, the trunk's sync, and learning where the truth is known."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.unit.predictor.test_predictor import branched, make_tree, policy, world  # noqa: F401
from trace_async.config import PredictorConfig
from trace_async.engine import WeightSyncError
from trace_async.predictor.features import history_features
from trace_async.predictor.head import MARGIN, StateHead
from trace_async.predictor.policy_trunk import PolicyTrunkPredictor, Rows
from trace_async.predictor.predictor import ValuePredictor
from trace_async.types import HiddenState, PrefixQuery
from trace_async.weights import WeightBucket, host_bucket, pack_weights

CONFIG = PredictorConfig(trunk="policy", num_layers=1, pooled_tokens=2)


def weights_of(path, scale=1.0, version=1):
    """What the learner would send: buckets and manifest."""
    model = AutoModelForCausalLM.from_pretrained(path)
    state = {name: tensor.detach() * scale for name, tensor in model.named_parameters()}
    return [host_bucket(state)], pack_weights(state, version).manifest


# ── the head ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_untrained_head_says_one_half():
    assert StateHead.untrained(3).values(np.ones((2, 3))).tolist() == [0.5, 0.5]


def test_without_penalty_the_head_finds_the_log_odds():
    """One binary input: the fit is exact, logit(share of successes) on either side."""
    states = np.array([[0.0], [0.0], [1.0], [1.0]], dtype=np.float32)
    targets, weights = np.array([0.0, 1.0, 0.0, 1.0]), np.array([3.0, 1.0, 1.0, 4.0])
    head = StateHead.untrained(1).refitted(states, targets, weights, l2=0.0)
    assert head is not None
    assert head.values(np.array([[0.0], [1.0]])) == pytest.approx([1 / 4, 4 / 5], abs=1e-3)


def test_a_penalty_shrinks_towards_the_mean_outcome():
    states = np.array([[0.0], [1.0]], dtype=np.float32)
    head = StateHead.untrained(1).refitted(states, np.array([0.0, 1.0]), np.array([1.0, 3.0]), l2=1e4)
    assert head is not None
    assert head.values(states) == pytest.approx([0.75, 0.75], abs=0.01)


def test_the_unit_of_a_state_does_not_matter():
    rng = np.random.default_rng(0)
    states = rng.normal(size=(200, 4)).astype(np.float32)
    targets, weights = (states[:, 0] > 0).astype(float), np.ones(200)
    plain = StateHead.untrained(4).refitted(states, targets, weights, l2=20.0)
    moved = StateHead.untrained(4).refitted(1000 * states - 7, targets, weights, l2=20.0)
    assert plain is not None
    assert moved is not None
    assert plain.values(states) == pytest.approx(moved.values(1000 * states - 7), abs=1e-3)
    again = plain.refitted(states, targets, weights, l2=20.0)  # from its own optimum
    assert again is not None
    assert again.values(states) == pytest.approx(plain.values(states), abs=1e-3)


def test_values_never_reach_certainty_and_a_broken_fit_gives_no_head():
    head = StateHead(np.zeros(1), np.ones(1), np.array([1e4]), 0.0)
    assert head.values(np.array([[-1.0], [1.0]])).tolist() == [MARGIN, 1 - MARGIN]
    states = np.array([[np.nan], [1.0]], dtype=np.float32)
    assert StateHead.untrained(1).refitted(states, np.array([0.0, 1.0]), np.ones(2), l2=0.1) is None


# ── the trunk ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_state_is_the_mean_of_the_last_tokens_of_the_policys_layer(policy):  # noqa: F811
    predictor = PolicyTrunkPredictor(CONFIG, policy)
    model = AutoModelForCausalLM.from_pretrained(policy)
    tokens = (1, 2, 3, 4, 5)
    with torch.no_grad():
        layers = model.model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
        expected = model.model.norm(layers[1])[0]  # after the first layer, under the final norm
    found = predictor.trunk.read([PrefixQuery(token_ids=tokens, positions=(1, 3, 5))])
    for state, mean in zip(found, (expected[:1], expected[1:3], expected[3:5]), strict=True):
        assert state == pytest.approx(mean.mean(dim=0).numpy(), abs=1e-4)


def test_after_a_sync_it_reads_what_the_new_policy_says(policy, tmp_path):  # noqa: F811
    predictor = PolicyTrunkPredictor(CONFIG, policy)
    query = PrefixQuery(token_ids=(1, 2, 3), positions=(3,))
    before = predictor.trunk.read([query])
    model = AutoModelForCausalLM.from_pretrained(policy)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(tmp_path)
    assert predictor.receive_weights(*weights_of(policy, scale=1.5, version=4)) == 4
    after = predictor.trunk.read([query])
    assert after == pytest.approx(PolicyTrunkPredictor(CONFIG, tmp_path).trunk.read([query]), abs=1e-5)
    assert np.abs(after - before).max() > 1e-3
    assert predictor.trunk.version == 4


def test_weights_in_bfloat16_arrive_as_their_values(policy):  # noqa: F811
    model = AutoModelForCausalLM.from_pretrained(policy)
    state = {name: tensor.detach().to(torch.bfloat16) for name, tensor in model.named_parameters()}
    predictor = PolicyTrunkPredictor(CONFIG, policy)
    predictor.receive_weights([host_bucket(state)], pack_weights(state, 1).manifest)
    held = dict(predictor.trunk._trunk.named_parameters())["embed_tokens.weight"]
    assert torch.equal(held, state["model.embed_tokens.weight"].float())


def test_a_sync_that_is_damaged_unchanged_or_incomplete_is_refused(policy):  # noqa: F811
    predictor = PolicyTrunkPredictor(CONFIG, policy)
    query = PrefixQuery(token_ids=(1, 2, 3), positions=(3,))
    before = predictor.trunk.read([query])
    (bucket,), manifest = weights_of(policy, scale=1.5)
    name = "model.layers.0.mlp.up_proj.weight"
    damaged = bucket.tensors[name].copy()
    damaged[0, 0] += 1
    with pytest.raises(WeightSyncError, match="received"):
        predictor.receive_weights([WeightBucket(tensors={**bucket.tensors, name: damaged})], manifest)
    some = {key: torch.from_numpy(value) for key, value in bucket.tensors.items() if key != name}
    with pytest.raises(WeightSyncError, match="up_proj"):
        predictor.receive_weights([host_bucket(some)], pack_weights(some, 1).manifest)
    assert predictor.trunk.version == 0
    assert predictor.trunk.read([query]) == pytest.approx(before)
    predictor.receive_weights([bucket], manifest)
    with pytest.raises(WeightSyncError, match="nothing changed"):
        predictor.receive_weights([bucket], replace(manifest, policy_version=2))
    assert predictor.trunk.version == 1


# ── learning ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def ask(predictor, trees):
    """What a run asks: every prompt at Stage 1, the turns of every root rollout at Stage 2; trees that carry V."""
    asked = []
    for tree in trees:
        tokens = tree.nodes[0].token_ids
        predictor.estimate([tree.task.id], [PrefixQuery(token_ids=tokens, positions=(len(tokens),))])
        nodes = list(tree.nodes)
        for rollout in (rollout for rollout in tree.rollouts if rollout.kind == "root"):
            turns = tree.path(rollout.leaf)[1:-1]
            if turns:
                ends = np.cumsum([len(tree.nodes[node].token_ids) for node in (0, *turns)])[1:].tolist()
                logprobs = tuple(tree.nodes[node].logprobs for node in turns)
                tokens = tree.prefix_tokens(turns[-1])
                query = PrefixQuery(token_ids=tokens, positions=tuple(ends), turn_logprobs=logprobs)
                for node, value in zip(turns, predictor.predict([query])[0], strict=True):
                    nodes[node] = replace(nodes[node], value=float(value))
        asked.append(replace(tree, nodes=tuple(nodes)))
    return asked


def test_it_learns_values_online_and_reads_nothing_twice(policy):  # noqa: F811
    rng = np.random.default_rng(0)
    predictor = PolicyTrunkPredictor(replace(CONFIG, head_l2=1e-3), policy)
    for version in range(8):
        last = predictor.train(ask(predictor, world(rng, 48)), version)
        assert last["rows_read_again"] == 0
        predictor.trunk.version = version + 1
    # by law (V = .9, .1, .5 by kind) the best Brier score of prompts is .143, of turns .09
    assert last["brier/depth_0"] < 0.2 < last["brier_base/depth_0"]
    assert last["brier/depth_1"] < 0.15
    # a third of the prompts show their outcome in a turn (AUC .9), the others' pairs are a coin: .73 by law
    assert last["auc_within"] > 0.65
    values = [predictor.predict([PrefixQuery(token_ids=(20 + kind, 9), positions=(2,))])[0][0] for kind in range(3)]
    assert values == pytest.approx([0.9, 0.1, 0.5], abs=0.2)


def test_what_was_asked_elsewhere_is_read_anew_and_gives_the_same_head(policy):  # noqa: F811
    trees = world(np.random.default_rng(0), 40)
    one, other = PolicyTrunkPredictor(CONFIG, policy), PolicyTrunkPredictor(CONFIG, policy)
    with_values = ask(one, trees)
    assert one.train(with_values, 0)["rows_read_again"] == 0
    assert other.train(with_values, 0)["rows_read_again"] == sum(1 + len(tree.rollouts) for tree in trees)
    query = PrefixQuery(token_ids=(22, 9, 5, 30), positions=(4,), turn_logprobs=((-1.0,),))
    assert one.predict([query])[0] == pytest.approx(other.predict([query])[0], abs=1e-3)


def test_learnt_again_from_what_they_taught_trees_give_the_same_heads_and_nothing_is_read(policy):  # noqa: F811
    one, again = PolicyTrunkPredictor(CONFIG, policy), PolicyTrunkPredictor(CONFIG, policy)
    again.trunk.read = None  # type: ignore[assignment]
    for version in range(2):
        trees = ask(one, world(np.random.default_rng(version), 40))
        metrics = one.train(trees, version)
        found = again.observe(trees, version, Rows(**one.taught.arrays()))
        losses = [step() for step in again.steps(trees)]
        assert again.learnt().manifest == one.learnt().manifest
        assert losses == [metrics["loss"]]
        assert found["brier/depth_0"] == metrics["brier/depth_0"]
        one.trunk.version = version + 1


def test_rows_are_stamped_with_the_version_they_were_read_under_and_dropped_when_old(policy):  # noqa: F811
    predictor = PolicyTrunkPredictor(replace(CONFIG, window_versions=2), policy)
    first, second = world(np.random.default_rng(0), 10), world(np.random.default_rng(1), 10)
    first, second = ask(predictor, first), ask(predictor, second)
    predictor.observe(first, 0)
    predictor.trunk.version = 1
    predictor.observe(second, 1)  # asked under version 0, trained on under version 1
    assert set(predictor.rows.versions) == {0}
    assert len(predictor.rows.targets) == 80
    third = ask(predictor, world(np.random.default_rng(2), 10))
    predictor.trunk.version = 2
    predictor.observe(third, 2)
    assert set(predictor.rows.versions) == {1}
    assert len(predictor.rows.targets) == 40


def test_a_prompt_is_taught_by_root_rollouts_alone_and_a_turn_by_all_leaves_below(policy):  # noqa: F811
    tree = make_tree([1, 2], [(0, [[3, 4], [5, 6]], 0), (1, [[7, 8]], 1), (1, [[9, 8]], 1)])
    predictor = PolicyTrunkPredictor(CONFIG, policy)
    predictor.observe(ask(predictor, [tree]), 0)
    assert predictor.rows.targets == pytest.approx([0, 2 / 3])
    assert predictor.rows.weights.tolist() == [1, 3]


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), 2.0])
def test_a_reward_that_is_no_probability_is_not_learnt_from(policy, reward):  # noqa: F811
    predictor = PolicyTrunkPredictor(CONFIG, policy)
    broken = make_tree([1, 2, 3], [(0, [[4, 5]], reward), (0, [[6, 7]], 1)], task_id="broken")
    metrics = predictor.train([*ask(predictor, [branched()]), broken], 0)
    assert metrics["skipped"] == 1
    assert np.isfinite(predictor.rows.targets).all()
    assert len(predictor.rows.targets) == 4  # prompt and turns 1, 2, 4 of the whole tree
    assert "broken" not in predictor.estimator.counts


def test_resumed_it_goes_on_as_if_never_stopped(policy, tmp_path):  # noqa: F811
    rng = np.random.default_rng(0)
    one = PolicyTrunkPredictor(CONFIG, policy)
    one.train(ask(one, world(rng, 24)), 0)
    one.save(tmp_path / "predictor")
    other = PolicyTrunkPredictor(CONFIG, policy)
    other.load(tmp_path / "predictor")
    query = PrefixQuery(token_ids=(20, 9), positions=(2,))
    assert one.predict([query])[0] == pytest.approx(other.predict([query])[0], abs=1e-12)
    more = world(rng, 24)
    went_on, resumed = one.train(more, 0), other.train(more, 0)
    # the questions under way are not saved: their states are read again
    assert resumed.pop("rows_read_again") > went_on.pop("rows_read_again")
    assert went_on == pytest.approx(resumed, abs=1e-4)
    ours, theirs = one.estimate(["5"], [query]), other.estimate(["5"], [query])
    assert ours.a == pytest.approx(theirs.a, rel=1e-3)  # what is read in another company differs in the last digits
    assert ours.b == pytest.approx(theirs.b, rel=1e-3)


def test_before_the_weights_have_come_a_resumed_one_answers_nothing(policy, tmp_path):  # noqa: F811
    one = PolicyTrunkPredictor(CONFIG, policy)
    one.trunk.version = 3
    one.train(world(np.random.default_rng(0), 12), 3)
    one.save(tmp_path / "predictor")
    other = PolicyTrunkPredictor(CONFIG, policy)
    other.load(tmp_path / "predictor")
    query = PrefixQuery(token_ids=(1, 2), positions=(2,))
    with pytest.raises(AssertionError, match="old weights"):
        other.predict([query])
    other.receive_weights(*weights_of(policy, scale=1.1, version=3))
    assert other.predict([query])[0].shape == (1,)


def test_too_few_rows_teach_nothing(policy):  # noqa: F811
    predictor = PolicyTrunkPredictor(CONFIG, policy)
    assert "loss" not in predictor.train([branched()], 0)
    assert predictor.predict([]) == []
    assert predictor.predict([PrefixQuery(token_ids=(1, 2), positions=(2,))])[0].tolist() == [0.5]


def test_without_steps_it_never_learns(policy):  # noqa: F811
    predictor = PolicyTrunkPredictor(replace(CONFIG, steps_per_update=0), policy)
    metrics = predictor.train(ask(predictor, world(np.random.default_rng(0), 48)), 0)
    assert "loss" not in metrics
    assert metrics["brier/depth_0"] == 0.25
    assert predictor.rows.is_prompt.all()  # nothing is read for lessons that nobody takes


def test_states_that_the_engine_gave_answer_and_teach_with_their_version(policy):  # noqa: F811
    predictor = PolicyTrunkPredictor(CONFIG, policy)
    predictor.train(ask(predictor, world(np.random.default_rng(0), 40)), 0)
    predictor.trunk.version = predictor.version = 3
    query = PrefixQuery(token_ids=(22, 9, 5, 30), positions=(3, 4), turn_logprobs=((-1.0,), (-2.0,)), prompt_value=0.7)
    (read,) = predictor.predict([query])
    first, second = predictor.trunk.read([query])
    given = replace(query, states=(HiddenState(2, 2, first.tobytes()), HiddenState(2, 2, second.tobytes())))
    tree = make_tree([22, 9], [(0, [[5], [30], [6]], 1)])  # the same history, and a last turn
    tree = replace(tree, nodes=(replace(tree.nodes[0], value=0.7), *tree.nodes[1:]))
    predictor.estimate(["t"], [PrefixQuery(token_ids=(22, 9), positions=(2,))])
    predictor.trunk.read = None  # type: ignore[assignment]  # nothing is read again
    assert predictor.predict([given])[0].tolist() == read.tolist()
    assert predictor.heads.prefix_values([given])[0].tolist() == read.tolist()
    metrics = predictor.observe([replace(tree, states={1: given.states[0], 2: given.states[1]})], 3)
    assert predictor.rows.versions[-3:].tolist() == [3, 2, 2]  # the prompt, which the trunk read, and two turns
    assert (metrics["states_from_engine"], metrics["state_age"]) == (1, 1)
    assert predictor.rows.states[-1][: len(second)] == pytest.approx(second)


def test_prompts_and_prefixes_are_read_after_layers_of_their_own(policy):  # noqa: F811
    both = PolicyTrunkPredictor(replace(CONFIG, num_layers=1, prefix_layers=0), policy)
    one, all_layers = (PolicyTrunkPredictor(replace(CONFIG, num_layers=n), policy) for n in (1, 0))
    prompt = PrefixQuery(token_ids=(1, 2, 3), positions=(3,))
    prefix = PrefixQuery(token_ids=(1, 2, 3, 4, 5), positions=(5,), turn_logprobs=((-1.0,),))
    both.predict([prefix, prompt])
    for other, query in ((one, prompt), (all_layers, prefix)):
        other.predict([query])
        ((key, (_, expected)),) = other.asked.items()
        assert both.asked[key][1] == pytest.approx(expected, abs=1e-5)
    both.receive_weights(*weights_of(policy, scale=1.5))  # also those of layers that the last question did not need
    all_layers.receive_weights(*weights_of(policy, scale=1.5))
    assert both.trunk.read([prefix]) == pytest.approx(all_layers.trunk.read([prefix]), abs=1e-5)


def test_what_is_believed_of_the_prompt_is_learnt_from(policy):  # noqa: F811
    """The same histories and states; only what was believed of the prompts tells their outcomes apart."""
    predictor = PolicyTrunkPredictor(replace(CONFIG, head_l2=1e-3), policy)
    trees = []
    for number in range(40):
        tree = make_tree([1, 2], [(0, [[3], [4]], number % 2)], task_id=str(number))
        state = HiddenState(0, 2, np.zeros(predictor.trunk.width, np.float32).tobytes())
        tree = replace(tree, nodes=(replace(tree.nodes[0], value=0.3 + 0.4 * (number % 2)), *tree.nodes[1:]))
        trees.append(replace(tree, states={1: state}))
    for tree in trees:
        predictor.train([tree], 0)
    query = PrefixQuery(token_ids=(1, 2, 3), positions=(3,), turn_logprobs=((-1.0,),), states=(state,))
    low, high = (predictor.predict([replace(query, prompt_value=value)])[0][0] for value in (0.3, 0.7))
    assert low < 0.2 < 0.8 < high


def test_questions_with_and_without_states_mix(policy):  # noqa: F811
    predictor = PolicyTrunkPredictor(CONFIG, policy)
    predictor.train(ask(predictor, world(np.random.default_rng(0), 40)), 0)
    one = PrefixQuery(token_ids=(22, 9, 5, 30), positions=(4,), turn_logprobs=((-1.0,),))
    other = PrefixQuery(token_ids=(21, 9), positions=(2,))
    given = replace(one, states=(HiddenState(0, 2, predictor.trunk.read([one])[0].tobytes()),))
    plain = [value[0] for value in predictor.predict([one, other, one])]
    assert [value[0] for value in predictor.predict([given, other, one])] == pytest.approx(plain, abs=1e-6)


@pytest.mark.parametrize("make", [PolicyTrunkPredictor, partial(ValuePredictor, seed=0)], ids=["policy", "own"])
def test_a_replica_answers_with_what_another_one_has_learnt(policy, make):  # noqa: F811
    trees = world(np.random.default_rng(0), 40)
    learning, replica = make(CONFIG, policy), make(CONFIG, policy)
    learning.train(ask(learning, trees), 0)
    query = PrefixQuery(token_ids=(22, 9, 5, 30), positions=(4,), turn_logprobs=((-1.0,),))
    assert replica.predict([query])[0] == [0.5]
    update = learning.learnt()
    damaged = {name: array + 1 for name, array in update.tensors.items()}
    with pytest.raises(ValueError, match="checksum"):
        replica.take_learnt(replace(update, tensors=damaged))
    assert replica.predict([query])[0] == [0.5]
    replica.take_learnt(update)
    assert replica.predict([query])[0] == pytest.approx(learning.predict([query])[0], abs=1e-6)
    assert replica.predict([query])[0] != [0.5]


def test_turns_of_continuations_teach_when_the_tree_brings_their_states(policy):  # noqa: F811
    predictor = PolicyTrunkPredictor(CONFIG, policy)
    tree = make_tree([1, 2], [(0, [[3, 4], [5, 6]], 0), (1, [[7, 8], [9, 9]], 1)])  # nodes 1-2, then 3-4 below 1
    state = HiddenState(
        0, 2, predictor.trunk.read([PrefixQuery(token_ids=(1, 2, 3, 4, 7, 8), positions=(6,))]).tobytes()
    )
    (asked,) = ask(predictor, [tree])
    predictor.observe([asked], 0)
    assert predictor.rows.targets == pytest.approx([0, 1 / 2])  # the prompt, turn 1
    metrics = predictor.observe([replace(asked, states={3: state})], 0)
    assert metrics["rows_read_again"] == 0
    assert predictor.rows.targets[2:] == pytest.approx([0, 1 / 2, 1])  # and turn 3
    read = np.frombuffer(state.values, np.float32)
    assert predictor.rows.states[-1][: len(read)] == pytest.approx(read)
    assert predictor.rows.states[-1][len(read) :].tolist() == history_features([(-1.0,), (-1.0,)], 6)


def test_of_equal_histories_the_state_of_the_most_tokens_speaks_for_all(policy):  # noqa: F811
    predictor = PolicyTrunkPredictor(CONFIG, policy)
    predictor.train(ask(predictor, world(np.random.default_rng(0), 40)), 0)
    query = PrefixQuery(token_ids=(22, 9, 5, 30), positions=(4,), turn_logprobs=((-1.0,),))
    (full,) = predictor.trunk.read([query])
    given = [
        replace(query, states=(HiddenState(0, count, (full * factor).tobytes()),)) for count, factor in ((1, 9), (2, 1))
    ]
    values = predictor.predict([given[0], given[1], given[0]])
    assert [value[0] for value in values] == pytest.approx([predictor.predict([query])[0][0]] * 3, abs=1e-6)
