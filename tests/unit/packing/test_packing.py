import random

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tests.support.random_trees import TASK, random_tree
from trace_async.method.credit import NodeCredit
from trace_async.packing.attention import block_mask, hidden_states, prepare_model, visible
from trace_async.packing.layout import (
    Piece,
    lay_out_tree,
    pack,
    pack_values,
    pieces_of,
    plan_micro_batches,
    round_rows,
)
from trace_async.trees.tree import Node, Rollout, RolloutTree
from trace_async.types import VersionSpan

VOCAB = 64
CPU = torch.device("cpu")
torch.set_num_threads(1)


def turn(parent: int, rollout: int, tokens: tuple[int, ...], generated: int, version: int = 0) -> Node:
    return Node(
        parent=parent,
        rollout=rollout,
        token_ids=tokens,
        num_generated=generated,
        logprobs=tuple(-float(t) for t in tokens[:generated]),
        version_spans=(VersionSpan(0, version),),
    )


@pytest.fixture
def small_tree() -> RolloutTree:
    """prompt 10 11 ─┬─ 20 21 |22 ─┬─ 30 31     (| : the observation begins)
    │             └─ 40 |41 ── 50
    └─ 60 61 62"""
    nodes = (
        Node(parent=-1, rollout=-1, token_ids=(10, 11), num_generated=0),
        turn(0, 0, (20, 21, 22), 2),
        turn(1, 0, (30, 31), 2),
        turn(0, 1, (60, 61, 62), 3, version=5),
        turn(1, 2, (40, 41), 1),
        turn(4, 2, (50,), 1),
    )
    rollouts = (
        Rollout(kind="root", anchor=0, leaf=2, reward=1.0),
        Rollout(kind="root", anchor=0, leaf=3, reward=0.0),
        Rollout(kind="continuation", anchor=1, leaf=5, reward=0.0),
    )
    return RolloutTree(task=TASK, nodes=nodes, rollouts=rollouts)


def credit_of(values: list[float]) -> NodeCredit:
    array = np.array(values, dtype=np.float64)
    return NodeCredit(positive=np.maximum(array, 0), negative=np.minimum(array, 0), weight=(array != 0) * 1.0)


def packed(trees, credits, packing, max_tokens=10**6, every_weight=False):
    pieces = [
        piece
        for i, (tree, credit) in enumerate(zip(trees, credits, strict=True))
        for piece in pieces_of(i, tree, credit, packing=packing, max_tokens=max_tokens, every_weight=every_weight)
    ]
    return pieces, [pack(trees, credits, [piece]) for piece in pieces]


def test_a_tree_is_laid_out_once_and_parting_tokens_predict_several(small_tree):
    credit = credit_of([0, 1, 2, -3, 4, -5])
    (piece,), (batch,) = packed([small_tree], [credit], "tree")
    # The last generated tokens 31, 62 and 50 are only predicted, never read.
    assert batch.layout.token_ids.tolist() == [10, 11, 20, 21, 22, 30, 40, 41, 60, 61]
    assert batch.layout.positions.tolist() == [0, 1, 2, 3, 4, 5, 5, 6, 2, 3]
    assert batch.layout.subtree_end.tolist() == [10, 10, 8, 8, 8, 6, 8, 8, 10, 10]
    assert piece == Piece(tree=0, targets=(1, 2, 4, 5, 3), num_tokens=10)
    entries = batch.entries
    assert entries.labels.tolist() == [20, 21, 30, 31, 40, 50, 60, 61, 62]
    assert entries.rows.tolist() == [1, 2, 4, 5, 4, 7, 1, 8, 9]
    assert entries.positive.tolist() == [1, 1, 2, 2, 4, 0, 0, 0, 0]
    assert entries.negative.tolist() == [0, 0, 0, 0, 0, -5, -3, -3, -3]
    assert entries.generator_logprobs.tolist() == [-20, -21, -30, -31, -40, -50, -60, -61, -62]
    assert entries.policy_versions.tolist() == [0, 0, 0, 0, 0, 0, 5, 5, 5]


def test_only_what_has_credit_and_its_context_is_packed(small_tree):
    _, (batch,) = packed([small_tree], [credit_of([0, 0, 0, 0, 0, -5])], "tree")
    assert batch.layout.token_ids.tolist() == [10, 11, 20, 21, 22, 40, 41]
    assert batch.entries.labels.tolist() == [50]
    assert packed([small_tree], [credit_of([0.0] * 6)], "tree") == ([], [])
    zero = np.zeros(6)
    weighted = NodeCredit(positive=zero, negative=zero, weight=np.array([0, 0, 0, 1.0, 0, 0]))
    assert packed([small_tree], [weighted], "tree")[0] == []
    _, (batch,) = packed([small_tree], [weighted], "tree", every_weight=True)
    assert batch.entries.labels.tolist() == [60, 61, 62]


def test_flat_lays_out_each_branch_and_trains_shared_nodes_once(small_tree):
    pieces, batches = packed([small_tree], [credit_of([0, 1, 2, -3, 4, -5])], "flat")
    assert [b.layout.token_ids.tolist() for b in batches] == [
        [10, 11, 20, 21, 22, 30],
        [10, 11, 20, 21, 22, 40, 41],
        [10, 11, 60, 61],
    ]
    assert [b.entries.labels.tolist() for b in batches] == [[20, 21, 30, 31], [40, 50], [60, 61, 62]]
    assert [piece.num_tokens for piece in pieces] == [6, 7, 4]


def test_a_tree_too_big_for_a_micro_batch_is_cut_between_branches(small_tree):
    pieces, batches = packed([small_tree], [credit_of([0, 1, 2, -3, 4, -5])], "tree", max_tokens=8)
    assert [b.layout.token_ids.tolist() for b in batches] == [[10, 11, 20, 21, 22, 30, 40, 41], [10, 11, 60, 61]]
    assert all(piece.num_tokens <= 8 for piece in pieces)
    assert torch.cat([b.entries.labels for b in batches]).tolist() == [20, 21, 30, 31, 40, 50, 60, 61, 62]


def test_version_spans_reach_the_entries():
    node = Node(
        parent=0,
        rollout=0,
        token_ids=(1, 2, 3, 4),
        num_generated=3,
        logprobs=(-1.0, -2.0, -3.0),
        version_spans=(VersionSpan(0, 7), VersionSpan(2, 9)),
    )
    prompt = Node(parent=-1, rollout=-1, token_ids=(5,), num_generated=0)
    tree = RolloutTree(task=TASK, nodes=(prompt, node), rollouts=(Rollout(kind="root", anchor=0, leaf=1, reward=1.0),))
    _, (batch,) = packed([tree], [credit_of([0, 1])], "tree")
    assert batch.entries.policy_versions.tolist() == [7, 7, 9]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_visibility_is_exactly_the_history(seed):
    tree = random_tree(random.Random(seed), continuations=5)
    layout, first = lay_out_tree(tree, {n: len(node.token_ids) for n, node in enumerate(tree.nodes)})
    sees = visible(layout, CPU)
    assert layout.num_tokens == tree.num_unique_tokens
    for n, node in enumerate(tree.nodes):
        last = first[n] + len(node.token_ids) - 1
        seen = sees[last].nonzero()[:, 0]
        assert tuple(layout.token_ids[seen].tolist()) == tree.prefix_tokens(n)
        assert layout.positions[seen].tolist() == list(range(len(seen)))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 12))
def test_the_flex_block_mask_is_the_one_that_all_pairs_make(seed, count):
    rng = random.Random(seed)
    trees = [random_tree(rng, continuations=rng.randrange(9), max_turns=6) for _ in range(count)]
    layout, _ = pack_values(trees)
    rows = torch.arange(layout.num_tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trace_async.packing.attention.FLEX_BLOCK", 8)
        found = block_mask(layout, CPU)
    assert torch.equal(found.mask_mod(0, 0, rows[:, None], rows[None]), visible(layout, CPU))
    size = layout.num_tokens
    wanted = create_block_mask(found.mask_mod, None, None, size, size, device="cpu", BLOCK_SIZE=8)
    for blocks in ("kv", "full_kv", "q", "full_q"):
        for part in ("num_blocks", "indices"):
            assert torch.equal(getattr(found, f"{blocks}_{part}"), getattr(wanted, f"{blocks}_{part}")), blocks
    assert found.shape == wanted.shape


def make_model(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "tie_word_embeddings": True,
    }
    if family == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=8)).double()
    return LlamaForCausalLM(LlamaConfig(**shape)).double()


def gradients(model, kind, batches):
    """Gradients of Σ P·min(ρ, 1.2) + N·max(ρ, 0.8): clipping acts per entry, so a wrong row would show."""
    prepare_model(model, kind)
    model.zero_grad()
    for batch in batches:
        batch = batch.to(next(model.parameters()).device)
        e = batch.entries
        logits = model.lm_head(hidden_states(model, batch.layout, kind).index_select(0, e.rows))
        ratio = (logits.log_softmax(-1).gather(1, e.labels[:, None])[:, 0] - e.generator_logprobs).exp()
        (e.positive * ratio.clamp(max=1.2) + e.negative * ratio.clamp(min=0.8)).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.fixture
def flex_trains_on_the_cpu(monkeypatch):
    """torch refuses FlexAttention's backward on the CPU, where it has no compiled one; uncompiled it works there."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.usefixtures("flex_trains_on_the_cpu")
def test_gradients_of_packed_and_flat_are_equal(family, seed):
    rng = random.Random(seed)
    shapes = [{"continuations": 6}, {"roots": 1, "max_turns": 1, "continuations": 0}, {"max_turns": 6}, {}]
    trees = [random_tree(rng, vocab=VOCAB, **shape) for shape in shapes]
    credits = [credit_of([0.0] + [rng.choice([0, 1, -1]) * rng.random() for _ in tree.nodes[1:]]) for tree in trees]
    model = make_model(family)
    expected = gradients(model, "plain", packed(trees, credits, "flat")[1])
    assert expected.abs().max() > 1e-3
    for kind, max_tokens in (("grouped", 10**6), ("grouped", 24), ("dense", 10**6), ("flex", 10**6), ("flex", 24)):
        pieces, _ = packed(trees, credits, "tree", max_tokens=max_tokens)
        (micro_batches,) = plan_micro_batches(pieces, num_ranks=1, max_tokens=max_tokens)
        found = gradients(model, kind, [pack(trees, credits, part) for part in micro_batches if part])
        # Weights are fp64, but transformers norms and rotates in fp32: equal to fp32 rounding.
        assert (found - expected).abs().max() < 5e-7 * expected.abs().max(), (kind, max_tokens)


def test_values_are_read_where_histories_end():
    rng = random.Random(5)
    trees = [random_tree(rng, vocab=VOCAB), random_tree(rng, vocab=VOCAB, continuations=0)]
    model = make_model("qwen3")
    layout, ends = pack_values(trees)
    assert layout.num_tokens == sum(tree.num_unique_tokens for tree in trees)
    prepare_model(model, "grouped")
    hidden = hidden_states(model, layout, "grouped")
    prepare_model(model, "plain")
    for tree, rows in zip(trees, ends, strict=True):
        for node, row in enumerate(rows):
            alone = model.model(input_ids=torch.tensor([tree.prefix_tokens(node)])).last_hidden_state[0, -1]
            assert torch.allclose(hidden[row], alone, atol=1e-6)


@settings(max_examples=100, deadline=None)
@example(sizes=[7, 7, 7, 14, 20, 20, 41], ranks=1, max_tokens=40)  # the long one alone let another reach 41, too
@given(
    sizes=st.lists(st.integers(1, 120), min_size=0, max_size=40),
    ranks=st.integers(1, 4),
    max_tokens=st.integers(20, 150),
)
def test_micro_batches_cover_all_pieces_within_bounds(sizes, ranks, max_tokens):
    pieces = [Piece(tree=i, targets=(1,), num_tokens=size) for i, size in enumerate(sizes)]
    plan = plan_micro_batches(pieces, num_ranks=ranks, max_tokens=max_tokens)
    assert len(plan) == ranks
    assert len({len(rank) for rank in plan}) == 1
    assert sorted(p.tree for rank in plan for part in rank for p in part) == list(range(len(sizes)))
    for part in (part for rank in plan for part in rank):
        assert sum(p.num_tokens for p in part) <= max_tokens or len(part) == 1


def test_rows_are_rounded_to_few_sizes_by_little():
    sizes = {round_rows(count) for count in range(1, 8193)}
    assert all(count <= round_rows(count) <= max(count + 15, 1.0626 * count) for count in range(1, 8193))
    assert len(sizes) < 110
    assert [round_rows(count) for count in (1, 16, 17, 512, 513, 8192)] == [16, 16, 32, 512, 544, 8192]


def test_ranks_get_equal_work():
    rng = random.Random(0)
    pieces = [Piece(tree=i, targets=(1,), num_tokens=rng.randint(100, 900)) for i in range(64)]
    plan = plan_micro_batches(pieces, num_ranks=4, max_tokens=4096)
    loads = [sum(p.num_tokens for part in rank for p in part) for rank in plan]
    assert max(loads) < 1.05 * min(loads)
    # No micro-batch more than first-fit needs.
    assert len(plan[0]) * 4 <= -(-sum(loads) // 4096) + 4


def test_sliding_window_models_are_refused_for_trees():
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, head_dim=8, use_sliding_window=True, sliding_window=8, max_window_layers=0,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    with pytest.raises(ValueError, match=r"learner\.packing=tree needs full attention"):
        prepare_model(model, "grouped")
    prepare_model(model, "plain")
