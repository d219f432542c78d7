"""Attend over a packed row (`packing.layout.Layout`), so that every token sees its ancestors and itself and no more.

There are four ways, which agree up to rounding. `attention_for` chooses one:

- `grouped` (CPU): a row falls into *segments*, runs of tokens without a branch. The queries of a segment attend to the
  gathered keys of their root-to-segment path, and segments of similar size share one SDPA call. This costs as much as
  the tree has tokens. Measured in docs/LOG.md: 2.5× faster than flat at a token ratio of 2.4, where a dense mask gains
  2.0× and loses on deep trees.
- `flex` (CUDA): FlexAttention with a block mask made of `subtree_end`.
- `dense`: a boolean [N, N] mask through SDPA, for CUDA without Triton and for models that know no other way.
- `plain`: only for rows of single branches (packing=flat): the model's own causal attention over padded branches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import nn

from trace_async.packing.layout import Layout, rounded

AttentionKind: TypeAlias = Literal["grouped", "flex", "dense", "plain"]

# Segments share an SDPA call while padding adds at most this share to the score pairs, or at most so many pairs.
PADDING_SHARE = 0.2
PADDING_PAIRS = 8192
# The size of FlexAttention's blocks. A row of whole blocks runs in kernels without checks at the borders.
FLEX_BLOCK = 128

_IMPLEMENTATION = {"grouped": "trace_grouped", "flex": "flex_attention", "dense": "sdpa", "plain": "sdpa"}


@dataclass(frozen=True, slots=True)
class SegmentGroup:
    """Segments that share one SDPA call, padded to the same size."""

    count: int
    """Number of segments."""
    queries: int
    """Q, queries of each segment with padding."""
    keys: int
    """K, keys of each segment with padding."""
    mask: torch.Tensor | None
    """Added to the scores [count, 1, Q, K]. None for the beginnings of trees, where Q = K and attention is causal."""


@dataclass(frozen=True, slots=True)
class SegmentPlan:
    """How `grouped` attends to one row of N tokens."""

    groups: tuple[SegmentGroup, ...]
    query_rows: torch.Tensor
    """The rows that are queries, group after group: Σ count·Q of them."""
    key_rows: torch.Tensor
    """The rows that are keys, group after group: Σ count·K of them."""
    output_rows: torch.Tensor
    """For each row [N], the place of its output among the queries."""


@dataclass(frozen=True, slots=True)
class _Segment:
    """A run of rows without a branch."""

    start: int
    end: int
    """The first row after it."""
    path: tuple[tuple[int, int], ...]
    """(start, end) of the segments from the root down to this one, both included."""
    num_keys: int
    """Rows on the path."""

    @property
    def num_queries(self) -> int:
        return self.end - self.start

    @property
    def is_root(self) -> bool:
        return self.num_keys == self.num_queries


def attention_for(device: torch.device, *, flat: bool) -> AttentionKind:
    """Choose the fastest way on this device (see the module)."""
    if flat:
        return "plain"
    if device.type != "cuda":
        return "grouped"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "dense"
    return "flex"


def prepare_model(model: Any, kind: AttentionKind) -> None:
    """Set the attention of a transformers model, once and before `hidden_states`.

    Raises ValueError for a model on which packed trees cannot be computed.
    """
    layer_types = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    if kind != "plain" and layer_types != {"full_attention"}:
        raise ValueError(
            f"learner.packing=tree needs full attention in every layer, not {sorted(layer_types)}: set flat"
        )
    if kind == "grouped":
        from transformers import AttentionInterface

        AttentionInterface.register("trace_grouped", _grouped_attention)
    model.set_attn_implementation(_IMPLEMENTATION[kind])


def hidden_states(model: Any, layout: Layout, kind: AttentionKind) -> torch.Tensor:
    """Return the last hidden states [N, hidden] of a row.

    `model` is a causal LM or its backbone and was prepared by `prepare_model`.
    """
    device = next(model.parameters()).device
    if kind == "plain":
        return _plain_hidden_states(model, layout, device)
    num_tokens, layout = layout.num_tokens, rounded(layout, FLEX_BLOCK if kind == "flex" else 1)
    extra: dict[str, Any] = {}
    if kind == "grouped":
        extra["segment_plan"] = plan_segments(layout, device=device, dtype=next(model.parameters()).dtype)
    elif kind == "dense":
        extra["attention_mask"] = visible(layout, device)[None, None]
    else:
        extra["attention_mask"] = block_mask(layout, device)
    output = model.base_model(
        input_ids=torch.from_numpy(layout.token_ids).to(device)[None],
        position_ids=torch.from_numpy(layout.positions).to(device)[None],
        use_cache=False,
        **extra,
    )
    return output.last_hidden_state[0, :num_tokens]


def visible(layout: Layout, device: torch.device) -> torch.Tensor:
    """Return a boolean [N, N] that says whether row q (first index) sees row k."""
    rows = torch.arange(layout.num_tokens, device=device)
    end = torch.from_numpy(layout.subtree_end).to(device)
    return (rows[None] <= rows[:, None]) & (rows[:, None] < end[None])


def block_mask(layout: Layout, device: torch.device) -> Any:
    """Return the FlexAttention block mask of a row.

    torch's `create_block_mask` would look at all N² pairs, which take 3 GB on the device for 32,768 tokens. Here the
    borders of the blocks are enough.
    """
    from torch.nn.attention.flex_attention import BlockMask

    end = torch.from_numpy(layout.subtree_end).to(device)

    def sees(_batch: Any, _head: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (k <= q) & (q < end[k])

    starts = np.arange(0, layout.num_tokens, FLEX_BLOCK)
    longest, shortest = (reduce.reduceat(layout.subtree_end, starts) for reduce in (np.maximum, np.minimum))
    queries, keys = starts[:, None], starts[None]
    # Blocks of which a query sees some key, and among them those of which every query sees every key.
    some = (keys <= queries) & (queries < longest[None])
    every = (keys < queries) & (queries + FLEX_BLOCK <= shortest[None])
    return BlockMask.from_kv_blocks(
        *_ordered(some & ~every, device),
        *_ordered(every, device),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=sees,
        seq_lengths=(layout.num_tokens, layout.num_tokens),
    )


def _ordered(blocks: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Put a boolean [query blocks, key blocks] into the form that FlexAttention wants.

    Returns how many blocks are true in each row, [1, 1, blocks], and the indices of the blocks with the true ones
    first, [1, 1, blocks, blocks]. Both are int32.
    """

    def placed(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array.astype(np.int32)).to(device)[None, None]

    return placed(blocks.sum(axis=1)), placed(np.argsort(~blocks, axis=1, kind="stable"))


def _plain_hidden_states(model: Any, layout: Layout, device: torch.device) -> torch.Tensor:
    starts = np.flatnonzero(layout.positions == 0)
    lengths = np.diff([*starts, layout.num_tokens])
    assert (layout.subtree_end == np.repeat(starts + lengths, lengths)).all(), "plain attention takes single branches"
    kept = np.arange(lengths.max())[None] < lengths[:, None]
    token_ids = np.zeros(kept.shape, dtype=np.int64)
    token_ids[kept] = layout.token_ids
    # Padding stands to the right: causal attention never looks at it, so no mask is needed.
    output = model.base_model(input_ids=torch.from_numpy(token_ids).to(device), use_cache=False)
    return output.last_hidden_state.flatten(0, 1).index_select(0, torch.from_numpy(np.flatnonzero(kept)).to(device))


def plan_segments(layout: Layout, *, device: torch.device, dtype: torch.dtype) -> SegmentPlan:
    """Group the segments of a row so that a few SDPA calls with little padding cover it."""
    groups: list[SegmentGroup] = []
    all_queries, all_keys, offset = [], [], 0
    output_rows = np.empty(layout.num_tokens, dtype=np.int64)
    for members in _group(_segments(layout)):
        queries = max(segment.num_queries for segment in members)
        keys = max(segment.num_keys for segment in members)
        query_rows = np.empty((len(members), queries), dtype=np.int64)
        key_rows = np.zeros((len(members), keys), dtype=np.int64)
        last_key = np.empty((len(members), queries), dtype=np.int64)
        for i, segment in enumerate(members):
            own = np.arange(queries)
            # Padding repeats the last query; nothing reads its output.
            query_rows[i] = np.minimum(segment.start + own, segment.end - 1)
            key_rows[i, : segment.num_keys] = np.concatenate([np.arange(a, b) for a, b in segment.path])
            last_key[i] = np.minimum(segment.num_keys - segment.num_queries + own, segment.num_keys - 1)
            output_rows[segment.start : segment.end] = offset + i * queries + own[: segment.num_queries]
        offset += len(members) * queries
        all_queries.append(query_rows.reshape(-1))
        all_keys.append(key_rows.reshape(-1))
        mask = None
        if not members[0].is_root:
            seen = torch.from_numpy(np.arange(keys) <= last_key[:, None, :, None])
            mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -torch.inf).to(device)
        groups.append(SegmentGroup(len(members), queries, keys, mask))
    indices = [
        torch.from_numpy(rows).to(device)
        for rows in (np.concatenate(all_queries), np.concatenate(all_keys), output_rows)
    ]
    return SegmentPlan(tuple(groups), *indices)


def _segments(layout: Layout) -> list[_Segment]:
    """Cut a row into runs in which each token is the only continuation of the one before it."""
    positions, end = layout.positions, layout.subtree_end
    begins = np.ones(layout.num_tokens, dtype=bool)
    begins[1:] = (positions[1:] != positions[:-1] + 1) | (end[1:] != end[:-1])
    starts = np.flatnonzero(begins)
    segments: list[_Segment] = []
    path: list[tuple[int, int]] = []
    for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), layout.num_tokens], strict=True):
        # Leave the segments whose subtree has ended; what remains are the ancestors.
        while path and end[path[-1][0]] <= start:
            path.pop()
        path.append((start, stop))
        segments.append(_Segment(start, stop, tuple(path), int(positions[stop - 1]) + 1))
    return segments


def _group(segments: Sequence[_Segment]) -> list[list[_Segment]]:
    """Put segments of similar size together, while the padding stays within PADDING_SHARE or PADDING_PAIRS."""
    groups: list[list[_Segment]] = []
    queries = keys = pairs = 0
    for segment in sorted(segments, key=lambda s: (s.is_root, s.num_keys, s.num_queries)):
        own = segment.num_queries * segment.num_keys
        queries, keys, pairs = max(queries, segment.num_queries), max(keys, segment.num_keys), pairs + own
        padded = (len(groups[-1]) + 1) * queries * keys if groups else 0
        alike = bool(groups) and groups[-1][0].is_root == segment.is_root
        if not alike or padded - pairs > max(PADDING_SHARE * pairs, PADDING_PAIRS):
            groups.append([])
            queries, keys, pairs = segment.num_queries, segment.num_keys, own
        groups[-1].append(segment)
    return groups


def _grouped_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    segment_plan: SegmentPlan,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_ignored: Any,
) -> tuple[torch.Tensor, None]:
    """Attend for transformers' AttentionInterface: query [1, H, N, D], key and value [1, H_kv, N, D] → [1, N, H, D].

    The indices go along dimension 0 of [N, ·], because there the backward of `index_select` is fast on the CPU.
    """
    if softcap is not None or s_aux is not None:
        raise ValueError("a cap on attention scores or an attention sink cannot be computed on packed trees")
    heads, rows, width = query.shape[1:]
    kv_heads = key.shape[1]
    flat_query = query[0].transpose(0, 1).reshape(rows, -1)
    flat_kv = torch.cat([t[0].transpose(0, 1).reshape(rows, -1) for t in (key, value)], dim=1)
    queries = flat_query.index_select(0, segment_plan.query_rows).split(
        [g.count * g.queries for g in segment_plan.groups]
    )
    keys_values = flat_kv.index_select(0, segment_plan.key_rows).split([g.count * g.keys for g in segment_plan.groups])
    outputs = []
    for group, q, kv in zip(segment_plan.groups, queries, keys_values, strict=True):
        q = q.view(group.count, group.queries, heads, width).transpose(1, 2)
        kv = kv.view(group.count, group.keys, 2, kv_heads, width).permute(2, 0, 3, 1, 4)
        k, v = kv.repeat_interleave(heads // kv_heads, dim=2) if heads > kv_heads else kv
        out = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=group.mask, is_causal=group.mask is None, scale=scaling
        )
        outputs.append(out.transpose(1, 2).reshape(-1, heads * width))
    result = torch.cat(outputs).index_select(0, segment_plan.output_rows)
    return result.view(1, rows, heads, width), None
