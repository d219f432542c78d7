"""The radix tree against hand-worked cases and against a brute-force set of prefixes."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trace_async.engines.embedded.radix_cache import RadixCache


def ids(*tokens):
    return np.array(tokens, np.int64)


def test_a_branch_inside_an_edge_shares_its_slots():
    cache = RadixCache(20)
    start, slots = cache.insert(ids(1, 2, 3, 4, 5))
    assert (start, len(slots)) == (0, 5)
    cache.settle()
    start, branch = cache.insert(ids(1, 2, 3, 9))
    assert (start, len(branch)) == (3, 1)
    cache.settle()
    assert cache.match(ids(1, 2, 3, 9, 7)).slots.tolist() == [*slots[:3], *branch]
    assert cache.match(ids(1, 2, 3, 4, 6)).slots.tolist() == slots[:4].tolist()
    assert cache.match(ids(2, 3)).slots.tolist() == []
    assert cache.num_cached == 6


def test_pending_prefixes_are_promised_but_not_served():
    cache = RadixCache(20)
    cache.insert(ids(1, 2, 3))
    cache.settle()
    cache.insert(ids(1, 2, 3, 4, 5))
    found = cache.match(ids(1, 2, 3, 4, 5, 6))
    assert (len(found.slots), found.num_promised) == (3, 5)
    cache.insert(ids(1, 2, 3, 4, 7))  # splits the pending edge: both halves stay pending
    assert len(cache.match(ids(1, 2, 3, 4)).slots) == 3
    cache.settle()
    assert len(cache.match(ids(1, 2, 3, 4, 7)).slots) == 5


def test_the_least_recently_used_leaf_goes_first_and_a_full_pool_takes_what_fits():
    cache = RadixCache(6)
    for tokens in (ids(1, 1), ids(2, 2), ids(3, 3)):
        cache.insert(tokens)
    cache.settle()
    cache.match(ids(1, 1))
    cache.insert(ids(4, 4))  # evicts 2, the oldest
    cache.settle()
    held = [len(cache.match(ids(k, k)).slots) for k in (1, 2, 3, 4)]
    assert held == [2, 0, 2, 2]
    start, slots = cache.insert(np.arange(10, 20))
    assert (start, len(slots)) == (0, 6)
    cache.insert(ids(7))  # everything is pending: nothing can be evicted, nothing is stored
    assert cache.match(ids(7)).num_promised == 0


sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=12)


@given(sequences)
@settings(max_examples=200, deadline=None)
def test_a_large_pool_matches_the_longest_common_prefix(inserted):
    cache, pool, seen = RadixCache(1_000), {}, []
    for sequence in inserted:
        tokens = np.array(sequence, np.int64)
        longest = max((_common(sequence, other) for other in seen), default=0)
        assert len(cache.match(tokens).slots) == longest
        start, slots = cache.insert(tokens)
        assert start == longest
        pool.update((int(slot), tuple(sequence[: start + i + 1])) for i, slot in enumerate(slots))
        cache.settle()
        seen.append(sequence)
        # Every slot holds exactly the prefix that it was written for.
        assert [pool[int(s)] for s in cache.match(tokens).slots] == [
            tuple(sequence[: i + 1]) for i in range(len(sequence))
        ]


@given(sequences, st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_a_small_pool_never_serves_a_wrong_slot_and_loses_none(inserted, capacity):
    cache, pool = RadixCache(capacity), {}
    for sequence in inserted:
        tokens = np.array(sequence, np.int64)
        start, slots = cache.insert(tokens)
        assert len(set(slots.tolist())) == len(slots)
        pool.update((int(slot), tuple(sequence[: start + i + 1])) for i, slot in enumerate(slots))
        cache.settle()
        served = cache.match(tokens).slots
        assert [pool[int(s)] for s in served] == [tuple(sequence[: i + 1]) for i in range(len(served))]
        assert cache.num_cached <= capacity
    cache.clear()
    assert len(cache.insert(np.arange(50))[1]) == capacity


def _common(a, b):
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n
