"""Questions in one row: every shared token once, and the rows from which each asked prefix is read."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trace_async.predictor.questions import lay_out_queries, prefix_keys
from trace_async.types import PrefixQuery


def test_two_questions_by_hand():
    queries = [
        PrefixQuery(token_ids=(7, 8, 9, 4), positions=(2, 4)),
        PrefixQuery(token_ids=(7, 8, 5), positions=(3,)),
    ]
    found = lay_out_queries(queries, num_last=3)
    # in lexicographic order: 7 8 5 and, beside the 5, 9 4
    assert found.layout.token_ids.tolist() == [7, 8, 5, 9, 4]
    assert found.layout.positions.tolist() == [0, 1, 2, 2, 3]
    assert found.layout.subtree_end.tolist() == [5, 5, 3, 5, 5]
    # after 7 8; after 7 8 9 4, the last three; after 7 8 5
    assert found.rows.tolist() == [0, 1, 1, 3, 4, 0, 1, 2]
    assert found.starts.tolist() == [0, 2, 5]


TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=7).map(tuple)


@settings(deadline=None)
@given(st.lists(TOKENS, min_size=1, max_size=6), st.integers(1, 3))
def test_every_prefix_is_read_from_rows_that_see_exactly_it(sequences, num_last):
    queries = [PrefixQuery(token_ids=s, positions=tuple(range(1, len(s) + 1))) for s in sequences]
    found = lay_out_queries(queries, num_last=num_last)
    layout = found.layout
    prefixes = [s[:end] for s in sequences for end in range(1, len(s) + 1)]
    assert layout.num_tokens == len(set(prefixes))  # a token is computed once for all that share it
    ends = [*found.starts[1:], len(found.rows)]
    for prefix, start, end in zip(prefixes, found.starts, ends, strict=True):
        rows = found.rows[start:end]
        seen = [row for row in range(rows[-1] + 1) if rows[-1] < layout.subtree_end[row]]
        assert tuple(layout.token_ids[seen]) == prefix
        assert layout.positions[seen].tolist() == list(range(len(prefix)))
        assert rows.tolist() == seen[-num_last:]


def test_a_key_depends_on_the_prefix_and_not_on_who_asks():
    long = prefix_keys(PrefixQuery(token_ids=(1, 2, 3, 4), positions=(2, 3)))
    alone = [prefix_keys(PrefixQuery(token_ids=(1, 2, 3)[:n], positions=(n,)))[0] for n in (2, 3)]
    assert long == alone
    assert len({*long, *prefix_keys(PrefixQuery(token_ids=(1, 23), positions=(2,)))}) == 3
    assert np.unique([key.hex() for key in long]).size == 2
