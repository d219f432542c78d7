"""Lay out questions about prefixes as one packed row, in which what they share stands once.

    a b c d (asked after 2 and 4)          row   a b c d e
    a b e   (asked after 3)                ends  2 → row 1, 4 → row 3, 3 → row 4

The root rollouts of a prompt share its prompt, and a tree's branches share more: every shared token is computed once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import xxhash

from trace_async.packing.layout import Layout
from trace_async.types import PrefixQuery

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PrefixRows:
    """The packed row, and for every asked prefix, query by query, the rows of its last tokens (at most `num_last`).

    `rows` [Σ lengths] are these rows one after another and `starts` [prefixes] says where each prefix's begin.
    """

    layout: Layout
    rows: np.ndarray
    starts: np.ndarray


def lay_out_queries(queries: Sequence[PrefixQuery], *, num_last: int) -> PrefixRows:
    """One row for all queries (at least one), shared beginnings once."""
    token_ids: list[int] = []
    positions: list[int] = []
    ends: list[int] = []
    path: list[int] = []
    before: tuple[int, ...] = ()
    paths: dict[tuple[int, ...], list[int]] = {}
    # In lexicographic order what shares a beginning is neighbours, so the row comes out depth-first.
    for tokens in sorted({query.token_ids for query in queries}):
        shared = _shared_length(before, tokens)
        for row in path[shared:]:
            ends[row] = len(token_ids)
        first = len(token_ids)
        token_ids.extend(tokens[shared:])
        positions.extend(range(shared, len(tokens)))
        ends.extend([0] * (len(tokens) - shared))
        path = path[:shared] + list(range(first, len(token_ids)))
        paths[tokens] = path
        before = tokens
    for row in path:
        ends[row] = len(token_ids)
    layout = Layout(
        token_ids=np.array(token_ids, dtype=np.int64),
        positions=np.array(positions, dtype=np.int64),
        subtree_end=np.array(ends, dtype=np.int64),
    )
    pooled = [paths[query.token_ids][max(0, end - num_last) : end] for query in queries for end in query.positions]
    starts = np.cumsum([0, *(len(rows) for rows in pooled[:-1])])
    return PrefixRows(layout, np.concatenate([np.array(rows, dtype=np.int64) for rows in pooled]), starts)


def _shared_length(one: Sequence[int], other: Sequence[int]) -> int:
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return min(len(one), len(other))


def prefix_keys(query: PrefixQuery) -> list[bytes]:
    """A key of each asked prefix that depends on its tokens alone, so that a finished tree finds its questions."""
    digest, keys, start = xxhash.xxh3_128(), [], 0
    for end in query.positions:
        digest.update(np.array(query.token_ids[start:end], dtype=np.int64).tobytes())
        keys.append(digest.digest())
        start = end
    return keys


def portions(items: Sequence[T], num_tokens: Sequence[int], max_tokens: int) -> Iterator[Sequence[T]]:
    """`items` in order, cut so that each portion has at most `max_tokens` tokens (or one item)."""
    start = total = 0
    for index, tokens in enumerate(num_tokens):
        if index > start and total + tokens > max_tokens:
            yield items[start:index]
            start, total = index, 0
        total += tokens
    if start < len(items):
        yield items[start:]
