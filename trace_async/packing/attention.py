"""Attention over a packed row (packing.Layout): every token sees its ancestors and itself, whatever the model.

Four ways, all equal to rounding; `attention_for` chooses:

- `grouped` (CPU): a row falls into *segments* (runs of tokens without a branch). Queries of a segment attend to the
  gathered keys of their root-to-segment path; segments of similar size share one SDPA call. Costs what the tree
  costs. Measured in docs/LOG.md: 2.5× flat at a token ratio of 2.4, where a dense mask gains 2.0× and loses on deep
  trees.
- `flex` (CUDA): FlexAttention with a block mask made of `subtree_end`.
- `dense`: a boolean [N, N] mask through SDPA; for CUDA without Triton and for models that know no other.
- `plain`: for rows of single branches (packing=flat) only: the model's own causal attention over padded branches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import nn

from trace_async.packing.layout import Layout, rounded

AttentionKind: TypeAlias = Literal["grouped", "flex", "dense", "plain"]

# Segments share an SDPA call while padding costs at most this share of score pairs more, or so many of them outright.
PADDING_SHARE = 0.2
PADDING_PAIRS = 8192
# FlexAttention's blocks; a row of whole blocks takes its kernels without checks at the borders.
FLEX_BLOCK = 128

_IMPLEMENTATION = {"grouped": "trace_grouped", "flex": "flex_attention", "dense": "sdpa", "plain": "sdpa"}


@dataclass(frozen=True, slots=True)
class SegmentGroup:
    """`count` segments, padded to Q `queries` and K `keys` each; additive `mask` [count, 1, Q, K].

    Without a mask they are the beginnings of trees (Q = K) and plain causal attention is meant.
    """

    count: int
    queries: int
    keys: int
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class SegmentPlan:
    """How `grouped` attends: the rows that are queries and keys, group after group (Σ count·Q and Σ count·K of them),
    and for each row [N] where its output stands among the queries."""

    groups: tuple[SegmentGroup, ...]
    query_rows: torch.Tensor
    key_rows: torch.Tensor
    output_rows: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Segment:
    start: int
    end: int
    path: tuple[tuple[int, int], ...]
    num_keys: int

    @property
    def num_queries(self) -> int:
        return self.end - self.start

    @property
    def is_root(self) -> bool:
        return self.num_keys == self.num_queries


def attention_for(device: torch.device, *, flat: bool) -> AttentionKind:
    """The fastest way on this device (see the module)."""
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
    """Set the attention of a transformers model once, before `hidden_states`. ValueError for models it cannot serve."""
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
    """Last hidden states [N, hidden] of a row, in a model of `prepare_model` (a causal LM or its backbone)."""
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
    """Boolean [N, N]: whether row q (first index) sees row k."""
    rows = torch.arange(layout.num_tokens, device=device)
    end = torch.from_numpy(layout.subtree_end).to(device)
    return (rows[None] <= rows[:, None]) & (rows[:, None] < end[None])


def block_mask(layout: Layout, device: torch.device) -> Any:
    """The FlexAttention block mask of a row: what torch's `create_block_mask` makes by looking at all N² pairs, which
    are 3 GB on the device for 32,768 tokens; here from the borders of the blocks alone."""
    from torch.nn.attention.flex_attention import BlockMask

    end = torch.from_numpy(layout.subtree_end).to(device)

    def sees(_batch: Any, _head: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (k <= q) & (q < end[k])

    starts = np.arange(0, layout.num_tokens, FLEX_BLOCK)
    longest, shortest = (reduce.reduceat(layout.subtree_end, starts) for reduce in (np.maximum, np.minimum))
    queries, keys = starts[:, None], starts[None]
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
    """Boolean [query blocks, key blocks] as FlexAttention wants it: how many are true in each row, [1, 1, blocks], and
    their indices before those of the others, [1, 1, blocks, blocks]; int32."""

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
    """Group the segments of a row so that few SDPA calls with little padding cover it."""
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
    """Runs of rows in which each row is the only continuation of the one before, with their root-to-segment rows."""
    positions, end = layout.positions, layout.subtree_end
    begins = np.ones(layout.num_tokens, dtype=bool)
    begins[1:] = (positions[1:] != positions[:-1] + 1) | (end[1:] != end[:-1])
    starts = np.flatnonzero(begins)
    segments: list[_Segment] = []
    path: list[tuple[int, int]] = []
    for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), layout.num_tokens], strict=True):
        while path and end[path[-1][0]] <= start:
            path.pop()
        path.append((start, stop))
        segments.append(_Segment(start, stop, tuple(path), int(positions[stop - 1]) + 1))
    return segments


def _group(segments: Sequence[_Segment]) -> list[list[_Segment]]:
    """Neighbours in size share a group while its padding stays within PADDING_SHARE or PADDING_PAIRS."""
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
    """For transformers' AttentionInterface: query [1, H, N, D], key and value [1, H_kv, N, D] → [1, N, H, D].

    Indices go along dimension 0 of [N, ·]: there the backward of `index_select` is fast on the CPU.
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
