"""Spending a budget one unit after another where it is worth most: the core of every allocation rule.

Each item (a prompt, a prefix) has a row of marginal values: what its 1st, 2nd, 3rd … unit adds, never rising. Then
the best way to spend `budget` units is to take the `budget` largest entries of all rows (exact for concave values).
Rows are computed only as far as they matter, so that a million units over 100,000 items take well under a second.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

# (items, width) → what each of the first `width` units is worth to each of `items`, [len(items), width].
Marginals = Callable[[IntArray, int], FloatArray]

_FIRST_WIDTH = 16


@dataclass(frozen=True, slots=True)
class Cut:
    """Where the `budget` largest entries end: at `threshold`, the smallest of them.

    Per item: `above`, its number of entries > threshold; `tied`, those equal to it; `last`, the smallest entry above
    it (inf: none); `following`, the first entry below it (-inf: none, the item is full).
    """

    threshold: float
    above: IntArray
    tied: IntArray
    last: FloatArray
    following: FloatArray


def cut(marginals: Marginals, num_items: int, budget: int, cap: int) -> Cut:
    """The cut for 1 ≤ budget ≤ num_items·cap units, at most `cap` per item. Rows must not rise.

    Rows start at a small width; those whose last known entry is still above the threshold are doubled. The threshold
    only rises by that, so a row that is settled stays settled and the total work is O(num_items + budget).
    """
    assert 1 <= budget <= num_items * cap
    width = min(cap, max(_FIRST_WIDTH, -(-budget // num_items)))
    items = np.arange(num_items)
    table = marginals(items, width)
    settled: list[tuple[IntArray, FloatArray]] = []
    while True:
        known = np.concatenate([entries.ravel() for _, entries in settled] + [table.ravel()])
        threshold = float(np.partition(known, known.size - budget)[known.size - budget])
        growing = table[:, -1] > threshold if width < cap else np.zeros(len(items), dtype=bool)
        settled.append((items[~growing], table[~growing]))
        if not growing.any():
            return _describe(settled, num_items, threshold)
        items, width = items[growing], min(cap, 2 * width)
        table = marginals(items, width)


def _describe(rows: list[tuple[IntArray, FloatArray]], num_items: int, threshold: float) -> Cut:
    above = np.zeros(num_items, dtype=np.int64)
    tied = np.zeros(num_items, dtype=np.int64)
    last = np.full(num_items, np.inf)
    following = np.full(num_items, -np.inf)
    for items, table in rows:
        num_above = (table > threshold).sum(axis=1)
        num_taken = (table >= threshold).sum(axis=1)
        above[items], tied[items] = num_above, num_taken - num_above
        (some,) = np.nonzero(num_above)
        last[items[some]] = table[some, num_above[some] - 1]
        (more,) = np.nonzero(num_taken < table.shape[1])
        following[items[more]] = table[more, num_taken[more]]
    return Cut(threshold, above, tied, last, following)


def fill_in_order(room: IntArray, units: int) -> IntArray:
    """Return counts that fill items in their order, at most `room` each, until `units` are spent."""
    before = np.cumsum(room) - room
    given: IntArray = np.clip(units - before, 0, room)
    return given


def spend(marginals: Marginals, num_items: int, budget: int, cap: int) -> IntArray:
    """Counts with the largest sum of marginals, summing to min(budget, num_items·cap); ties go to the first items."""
    units = min(budget, num_items * cap)
    if units == 0:
        return np.zeros(num_items, dtype=np.int64)
    found = cut(marginals, num_items, units, cap)
    return found.above + fill_in_order(found.tied, units - int(found.above.sum()))
