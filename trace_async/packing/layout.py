"""Lay rollout trees out as rows in which every shared token stands once, and list what each row has to predict.

    tree                      row (depth-first)        positions           subtree_end
    a b ─┬─ c d ─┬─ e         a b c d e f g            0 1 2 3 4 4 2       7 7 6 6 5 6 7
         │       └─ f
         └─ g

Row q sees row k exactly when `k ≤ q < subtree_end[k]`, that is when k is q itself or one of its ancestors. A token at
which branches part (b, d) has several next tokens to predict. So training does not use shifted labels but *entries*,
pairs of a source row and a label. Several trees may share a row; they do not see each other.

`packing=flat` lays every branch out on its own, as trainers without trees do. Both packings give the same gradient up
to rounding (tests/unit/packing/test_packing.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
import torch

from trace_async.method.credit import NodeCredit
from trace_async.policy.cpu_linear import round_rows
from trace_async.trees.tree import RolloutTree

Packing = Literal["tree", "flat"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """N tokens of a forest in depth-first order. All arrays are int64 [N]."""

    token_ids: np.ndarray
    positions: np.ndarray
    """The token's position in its own history, counted from 0."""
    subtree_end: np.ndarray
    """The first row after the token's descendants."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part of a tree that is packed as a whole."""

    tree: int
    """Index of the tree."""
    targets: tuple[int, ...]
    """The nodes whose generated tokens are trained here. Every node is a target of at most one piece."""
    num_tokens: int
    """The rows that the piece takes, with the context that its targets need."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entries:
    """The E tokens that are trained. All tensors are [E], int64 or float32."""

    rows: torch.Tensor
    """The row that predicts the token."""
    labels: torch.Tensor
    """The token's id."""
    generator_logprobs: torch.Tensor
    """The token's log-probability when it was sampled."""
    positive: torch.Tensor
    """The positive part of the token's credit, ≥ 0 (see `NodeCredit`)."""
    negative: torch.Tensor
    """The negative part of its credit, ≤ 0."""
    weight: torch.Tensor
    """The token's weight in a term that has no advantage, such as KL; ≥ 0."""
    policy_versions: torch.Tensor
    """The policy version that wrote the token."""

    @property
    def count(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Entries":
        return Entries(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """One micro-batch: a row of tokens and its entries."""

    layout: Layout
    entries: Entries
    has_credit: bool = True
    """False for a batch that is computed only to keep the ranks in step."""

    def to(self, device: torch.device) -> "PackedBatch":
        return replace(self, entries=self.entries.to(device))

    def without_credit(self) -> "PackedBatch":
        none = torch.zeros_like(self.entries.weight)
        return replace(self, entries=replace(self.entries, positive=none, negative=none, weight=none), has_credit=False)


def lay_out_tree(tree: RolloutTree, ends: Mapping[int, int]) -> tuple[Layout, dict[int, int]]:
    """Lay out the nodes in `ends` with all their ancestors. Returns also, per node, the row of its first token.

    `ends[y]` says how many tokens of node y are wanted (0 … all) if nothing below y is. A node with something below it
    is laid out whole.
    """
    wanted = set(ends)
    for node in ends:
        while (before := tree.nodes[node].before) >= 0 and before not in wanted:
            node = before
            wanted.add(node)
    inner = {tree.nodes[node].before for node in wanted}
    tokens: list[int] = []
    positions: list[np.ndarray] = []
    first_row: dict[int, int] = {}
    depth_after = {-1: 0}
    order = _depth_first(tree, wanted)
    for node in order:
        kept = tree.nodes[node].token_ids if node in inner else tree.nodes[node].token_ids[: ends[node]]
        depth = depth_after[tree.nodes[node].before]
        first_row[node] = len(tokens)
        tokens.extend(kept)
        positions.append(np.arange(depth, depth + len(kept)))
        depth_after[node] = depth + len(kept)
    end_row = {node: first_row[node] + len(rows) for node, rows in zip(order, positions, strict=True)}
    subtree_end: dict[int, int] = {}
    # Backwards, so that all descendants have told a node where they end before the node itself is looked at.
    for node in reversed(order):
        subtree_end[node] = max(subtree_end.get(node, 0), end_row[node])
        before = tree.nodes[node].before
        subtree_end[before] = max(subtree_end.get(before, 0), subtree_end[node])
    layout = Layout(
        token_ids=np.array(tokens, dtype=np.int64),
        positions=np.concatenate(positions).astype(np.int64) if positions else np.zeros(0, np.int64),
        subtree_end=np.repeat(
            np.array([subtree_end[node] for node in order], dtype=np.int64), [len(rows) for rows in positions]
        ),
    )
    return layout, first_row


def _depth_first(tree: RolloutTree, wanted: set[int]) -> list[int]:
    """List the wanted nodes depth-first, by the chain of tokens.

    A second conversation of a rollout stands beside the prompt's, because neither sees the other.
    """
    order, stack = [], [node for node in reversed(tree.token_children[-1]) if node in wanted]
    while stack:
        node = stack.pop()
        order.append(node)
        stack.extend(child for child in reversed(tree.token_children[node]) if child in wanted)
    return order


def concatenate(layouts: Sequence[Layout]) -> Layout:
    """Put several forests side by side. None sees another."""
    starts = np.cumsum([0, *(layout.num_tokens for layout in layouts)])
    return Layout(
        token_ids=np.concatenate([layout.token_ids for layout in layouts]),
        positions=np.concatenate([layout.positions for layout in layouts]),
        subtree_end=np.concatenate([lay.subtree_end + start for lay, start in zip(layouts, starts, strict=False)]),
    )


def rounded(layout: Layout, multiple: int = 1) -> Layout:
    """Pad a row to the length that `round_rows` gives, rounded up to a multiple of `multiple`.

    The padding is a branch of its own, which sees only itself and which no other token sees.
    """
    extra = -(-round_rows(layout.num_tokens) // multiple) * multiple - layout.num_tokens
    filler = Layout(
        token_ids=np.zeros(extra, dtype=np.int64),
        positions=np.arange(extra, dtype=np.int64),
        subtree_end=np.full(extra, extra, dtype=np.int64),
    )
    return concatenate([layout, filler])


def pack_values(trees: Sequence[RolloutTree]) -> tuple[Layout, list[np.ndarray]]:
    """Lay all tokens of all trees out in one row. Returns also, per tree, the row [num_nodes] where each history ends.

    The predictor reads V(H) from the hidden state in that row. A node without tokens reads the row before it.
    """
    layouts, ends, start = [], [], 0
    for tree in trees:
        layout, first_row = lay_out_tree(tree, {n: len(node.token_ids) for n, node in enumerate(tree.nodes)})
        last = np.zeros(len(tree.nodes), dtype=np.int64)
        for n, node in enumerate(tree.nodes):
            last[n] = start + first_row[n] + len(node.token_ids) - 1 if node.token_ids else last[node.before]
        layouts.append(layout)
        ends.append(last)
        start += layout.num_tokens
    return concatenate(layouts), ends


def pieces_of(
    index: int, tree: RolloutTree, credit: NodeCredit, *, packing: Packing, max_tokens: int, every_weight: bool
) -> list[Piece]:
    """Cut one tree into the parts that have to be computed, each of at most `max_tokens` rows if its branches allow it.

    The nodes with credit are trained; with `every_weight` (KL or entropy in the loss) all nodes that carry weight.
    Only these and their context are laid out. A tree that fits is one piece. A larger one is cut between branches in
    depth-first order, and the context is repeated. With `flat`, every branch is a piece, and a shared node is trained
    in the first one.
    """
    trained = credit.weight > 0 if every_weight else (credit.positive > 0) | (credit.negative < 0)
    order = _depth_first(tree, set(range(len(tree.nodes))))
    targets = [node for node in order if trained[node] and tree.nodes[node].num_generated]
    if packing == "flat":
        ancestors = {above for node in targets for above in tree.token_path(node)[:-1]}
        groups, group = [], []
        for node in targets:
            group.append(node)
            if node not in ancestors:
                groups.append(group)
                group = []
    elif _num_rows(tree, targets) <= max_tokens:
        groups = [targets] if targets else []
    else:
        groups = [[targets[0]]]
        for node in targets[1:]:
            if _num_rows(tree, [*groups[-1], node]) > max_tokens:
                groups.append([])
            groups[-1].append(node)
    return [Piece(tree=index, targets=tuple(group), num_tokens=_num_rows(tree, group)) for group in groups]


def _num_rows(tree: RolloutTree, targets: Sequence[int]) -> int:
    inner = {above for node in targets for above in tree.token_path(node)[:-1]}
    context = sum(len(tree.nodes[node].token_ids) for node in inner)
    # The last generated token of a leaf is only predicted, never a source, so it needs no row.
    return context + sum(tree.nodes[node].num_generated - 1 for node in targets if node not in inner)


def pack_all(
    trees: Sequence[RolloutTree], credits: Sequence[NodeCredit], *, packing: Packing, max_tokens: int
) -> list[PackedBatch]:
    """Pack the tokens of all trees that carry credit into micro-batches for one rank."""
    pieces = [
        piece
        for index, (tree, credit) in enumerate(zip(trees, credits, strict=True))
        for piece in pieces_of(index, tree, credit, packing=packing, max_tokens=max_tokens, every_weight=False)
    ]
    if not pieces:
        return []
    (micro_batches,) = plan_micro_batches(pieces, num_ranks=1, max_tokens=max_tokens)
    return [pack(trees, credits, part) for part in micro_batches]


def plan_micro_batches(pieces: Sequence[Piece], *, num_ranks: int, max_tokens: int) -> list[list[list[Piece]]]:
    """Deal the pieces out to micro-batches and ranks, balanced by rows. Returns, per rank, its micro-batches.

    Every rank gets equally many, because ranks must make the same number of passes; some batches may be empty.
    First-fit decreasing gives the number of micro-batches. The pieces are then spread evenly over that many (longest
    first, into the emptiest) unless that would overfill one. A piece above `max_tokens` goes alone.
    """
    longest_first = sorted(pieces, key=lambda piece: -piece.num_tokens)
    fitted: list[list[Piece]] = []
    for piece in longest_first:
        home = next((b for b in fitted if _load(b) + piece.num_tokens <= max_tokens), None)
        if home is None:
            fitted.append([piece])
        else:
            home.append(piece)
    count = max(1, -(-len(fitted) // num_ranks)) * num_ranks
    even: list[list[Piece]] = [[] for _ in range(count)]
    for piece in longest_first:
        min(even, key=_load).append(piece)
    if any(_load(batch) > max_tokens and len(batch) > 1 for batch in even):  # fall back to what is known to fit
        even = fitted + [[] for _ in range(count - len(fitted))]
    even.sort(key=_load, reverse=True)
    ranks: list[list[list[Piece]]] = [[] for _ in range(num_ranks)]
    for batch in even:
        min((rank for rank in ranks if len(rank) < count // num_ranks), key=lambda r: sum(map(_load, r))).append(batch)
    return ranks


def _load(batch: Sequence[Piece]) -> int:
    return sum(piece.num_tokens for piece in batch)


def pack(trees: Sequence[RolloutTree], credits: Sequence[NodeCredit], pieces: Sequence[Piece]) -> PackedBatch:
    """Build one micro-batch of at least one piece. `Piece.tree` indexes `trees` and `credits`."""
    layouts: list[Layout] = []
    parts: list[tuple[np.ndarray, ...]] = []
    start = 0
    for piece in pieces:
        tree, credit = trees[piece.tree], credits[piece.tree]
        layout, first_row = lay_out_tree(tree, {n: tree.nodes[n].num_generated - 1 for n in piece.targets})
        assert layout.num_tokens == piece.num_tokens
        parts.extend(_node_entries(tree, credit, node, start, first_row) for node in piece.targets)
        layouts.append(layout)
        start += layout.num_tokens
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    integers = [torch.from_numpy(column.astype(np.int64)) for column in columns[:3]]
    floats = [torch.from_numpy(column.astype(np.float32)) for column in columns[3:]]
    entries = Entries(
        rows=integers[0],
        labels=integers[1],
        policy_versions=integers[2],
        generator_logprobs=floats[0],
        positive=floats[1],
        negative=floats[2],
        weight=floats[3],
    )
    return PackedBatch(layout=concatenate(layouts), entries=entries)


def _node_entries(
    tree: RolloutTree, credit: NodeCredit, node: int, start: int, first_row: Mapping[int, int]
) -> tuple[np.ndarray, ...]:
    """Return the columns of `Entries` for one node."""
    record = tree.nodes[node]
    count = record.num_generated
    above = record.before
    while not tree.nodes[above].token_ids:
        above = tree.nodes[above].before
        assert above >= 0, "a prompt has tokens"
    rows = start + first_row[node] + np.arange(-1, count - 1)
    # The row before a node may belong to a sibling: its first token is predicted where its own history ends.
    rows[0] = start + first_row[above] + len(tree.nodes[above].token_ids) - 1
    spans = record.version_spans
    lengths = np.diff([*(span.start for span in spans), count])
    return (
        rows,
        np.array(record.token_ids[:count]),
        np.repeat([span.policy_version for span in spans], lengths),
        np.array(record.logprobs),
        np.full(count, credit.positive[node]),
        np.full(count, credit.negative[node]),
        np.full(count, credit.weight[node]),
    )
