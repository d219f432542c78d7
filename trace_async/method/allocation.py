"""TRACE's allocation of the rollout budget (arXiv 2606.11119): Stage 1 over prompts, Stage 2 over prefixes.

Both maximise the chance that the descendants of an anchor hold a success and a failure, and are exact: equal to
exhaustive dynamic programming (see test_allocation.py). `allocate_roots` and `allocate_prefixes` are plain functions,
to be called from anywhere; the rules that a run can choose are built on them (`stage1/active.py`,
`stage2/contrast.py`).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trace_async.method.knapsack import Cut, FloatArray, IntArray, Marginals, cut, fill_in_order, spend

_TOKEN_STEPS = 4096  # resolution of a budget in tokens


def root_value(success: ArrayLike, num_rollouts: ArrayLike, *, strength: ArrayLike | None = None) -> FloatArray:
    """V_root: the probability that `num_rollouts` rollouts (≥ 0) of a prompt hold both outcomes; broadcasts.

    V_root(v, m) = 1 − v^m − (1−v)^m, and 0 for m = 0 (METHOD 2, Stage 1). With `strength` s, v is not known but has the
    posterior Beta(v·s, (1−v)·s): E[v^m] = Π_{j<m} (v·s + j)/(s + j).
    """
    v, m = np.broadcast_arrays(np.asarray(success, dtype=float), np.asarray(num_rollouts))
    c = np.broadcast_to(_uncertainty(strength), v.shape)
    all_succeed, all_fail = np.ones(v.shape), np.ones(v.shape)
    for j in range(int(m.max(initial=0))):
        all_succeed = np.where(j < m, all_succeed * (v + c * j) / (1 + c * j), all_succeed)
        all_fail = np.where(j < m, all_fail * (1 - v + c * j) / (1 + c * j), all_fail)
    return np.asarray(np.where(m == 0, 0.0, 1 - all_succeed - all_fail), dtype=float)


def allocate_roots(
    success: ArrayLike,
    budget: int,
    *,
    min_rollouts: int = 0,
    max_rollouts: int | None = None,
    strength: ArrayLike | None = None,
) -> IntArray:
    """Stage 1: how many root rollouts each prompt gets, so that Σ V_root(success_i, m_i) is greatest.

    `success` [prompts]: estimated probability that a rollout succeeds. `strength` [prompts] or scalar: pseudo rollouts
    behind each estimate; then E[V_root] under a Beta posterior is maximised. Returns integers [prompts] with
    min_rollouts ≤ m_i ≤ max_rollouts and Σ m_i = budget, or all at max_rollouts when the budget exceeds that. Raises
    ValueError when the budget cannot give everyone min_rollouts.

    Exactness. With u = E[v(1−v)], V_root's marginals are 0, 2u, u, then falling: concave but for the first unit. From
    min_rollouts ≥ 1 on, taking the largest marginals is exact. Otherwise replace 0, 2u, u by u, u, u (the concave
    envelope: the first two are a bundle) and cut at threshold λ. Ties at λ can be filled in any number but 1 (bundles
    bring 2 or 3), so the envelope's bound is reached unless one unit is left over; see `_place_last_unit`.
    """
    v = _probabilities("success", success)
    c = np.broadcast_to(_uncertainty(strength), v.shape)
    cap = budget if max_rollouts is None else min(max_rollouts, budget)
    if budget < 0 or min_rollouts < 0 or (max_rollouts is not None and max_rollouts < min_rollouts):
        raise ValueError(f"need 0 ≤ {min_rollouts=} ≤ {max_rollouts=} and {budget=} ≥ 0")
    if len(v) * min_rollouts > budget:
        raise ValueError(f"{budget=} cannot give min_rollouts={min_rollouts} to each of {len(v)} prompts")
    units = min(budget, len(v) * cap)
    if min_rollouts >= 1 or cap < 2 or units == 0:
        first = max(1, min_rollouts) + 1
        spare = cap - min_rollouts if cap >= 2 else 0
        counts = np.full(len(v), min_rollouts) + spend(
            lambda items, width: _root_marginals(v[items], c[items], first, width),
            len(v), units - len(v) * min_rollouts, spare,
        )  # fmt: skip
        return counts + fill_in_order(cap - counts, units - int(counts.sum()))

    found = cut(lambda items, width: _root_envelope(v[items], c[items], width), len(v), units, cap)
    return _fill_bundles(found, units, cap)


def root_rates(
    success: ArrayLike, cost: ArrayLike, *, max_rollouts: int, strength: ArrayLike | None = None
) -> FloatArray:
    """Contrast per token of each prompt's 1st … max_rollouts-th root rollout, [prompts, max_rollouts], never rising.

    `cost` [prompts] > 0: expected generated tokens of a root rollout. The first three (two where no more may be had)
    are worth the same: V_root's concave envelope, as nobody buys less of a prompt.
    """
    v, tokens = _probabilities("success", success), np.asarray(cost, dtype=float)
    if tokens.shape != v.shape or not (tokens > 0).all() or max_rollouts < 2:
        raise ValueError(f"need {len(v)} costs > 0 and {max_rollouts=} ≥ 2")
    c = np.broadcast_to(_uncertainty(strength), v.shape)
    return np.asarray(_root_envelope(v, c, max_rollouts) / tokens[:, None])


def allocate_roots_at_price(
    success: ArrayLike, price: float, cost: ArrayLike, *, max_rollouts: int, strength: ArrayLike | None = None
) -> IntArray:
    """Stage 1 at a price: for each prompt the m ≤ max_rollouts at which V_root(m) − price·cost·m is greatest.

    No prompt waits for another, and the number of rollouts is what the price makes of it. No prompt gets just one.
    """
    rates = root_rates(success, cost, max_rollouts=max_rollouts, strength=strength)
    return np.asarray((rates > price).sum(axis=1), dtype=np.int64)


def _fill_bundles(found: Cut, units: int, cap: int) -> IntArray:
    """Counts from the envelope's cut: prompts tied at the threshold are opened by twos, as many as the units allow."""
    left = units - int(found.above.sum())
    bundle = (found.above == 0) & (found.tied > 0)
    opened = fill_in_order(2 * bundle.astype(np.int64), left - left % 2)
    counts = found.above + opened
    room = np.where(counts > 0, found.tied - opened, 0)
    counts = counts + fill_in_order(room, units - int(counts.sum()))
    left = units - int(counts.sum())
    assert left in (0, 1)
    return _place_last_unit(found, counts, bundle) if left else counts


def _place_last_unit(found: Cut, counts: IntArray, bundle: NDArray[np.bool_]) -> IntArray:
    """Spends the one unit that is left before a bundle (two units worth 2λ) at threshold λ, the best way there is.

    Either it goes to the open prompt with the best next marginal d < λ (loses λ − d against the bound), or the bundle
    is bought and the open prompt with the lowest last marginal D ≥ λ gives one up (loses D − λ), or it is wasted
    (loses λ). Every other exchange contains one of these: whoever closes a prompt of m ≥ 3, or opens one worth u ≤ λ,
    loses at least as much. With cap = 2 only waste remains.
    """
    counts = counts.copy()
    is_open = found.above >= 3
    lasts, followings = np.where(is_open, found.last, np.inf), np.where(is_open, found.following, -np.inf)
    gives, takes = int(np.argmin(lasts)), int(np.argmax(followings))
    gain_swap, gain_add = 2 * found.threshold - lasts[gives], followings[takes]
    closed = int(np.flatnonzero(bundle & (counts == 0))[0])
    if max(gain_swap, gain_add) < 0:
        counts[closed] += 1
    elif gain_swap > gain_add:
        counts[closed] += 2
        counts[gives] -= 1
    else:
        counts[takes] += 1
    return counts


def _root_envelope(v: FloatArray, c: FloatArray, width: int) -> FloatArray:
    """The marginals 0, 2u, u … of V_root as u, u, u, …: the least concave function above it, [len(v), width]."""
    u = (v * (1 - v) / (1 + c))[:, None]
    rest = _root_marginals(v, c, 4, width - 3) if width > 3 else u[:, :0]
    return np.concatenate([np.repeat(u, min(width, 3), axis=1), np.minimum(rest, u)], axis=1)


def _root_marginals(v: FloatArray, c: FloatArray, first: int, width: int) -> FloatArray:
    """E[V_root(m)] − E[V_root(m − 1)] for m = first … first + width − 1 (first ≥ 2), [len(v), width].

    That is E[v^{m−1}(1−v)] + E[(1−v)^{m−1}v]; each step m → m + 1 multiplies the first term by (a + m)/(a + b + m + 1).
    """
    m = np.arange(2, first + width - 1)
    v, c = v[:, None], c[:, None]
    start = v * (1 - v) / (1 + c)
    total = np.zeros((len(v), 1))
    for x in (v, 1 - v):
        ratios = (x + c * (m - 1)) / (1 + c * m)
        total = total + np.cumprod(np.concatenate([start, ratios], axis=1), axis=1)
    return total[:, first - 2 :]


def prefix_value(success: ArrayLike, rewards: ArrayLike, num_continuations: ArrayLike) -> FloatArray:
    """V_pref = 1 − [r·V + (1−r)·(1−V)]^k: the chance that one of k continuations ends unlike the rollout with r."""
    v, r = np.asarray(success, dtype=float), np.asarray(rewards, dtype=float)
    return np.asarray(1 - (r * v + (1 - r) * (1 - v)) ** np.asarray(num_continuations), dtype=float)


def allocate_prefixes(
    success: ArrayLike,
    rewards: ArrayLike,
    budget: int,
    *,
    max_per_prefix: int | None = None,
    cost: ArrayLike | None = None,
) -> IntArray:
    """Stage 2: how many continuations each prefix gets, so that Σ V_pref(prefix, k) is greatest.

    `success` [prefixes]: V(H); `rewards` [prefixes]: outcome in [0, 1] of the rollout that passed there. Returns
    integers [prefixes] summing to `budget` (or all at max_per_prefix). V_pref is concave in k, so taking the largest
    marginals is exact. `cost` [prefixes] > 0, expected generated tokens of a continuation: marginals are ranked by
    value per token (beyond the paper).
    """
    v, r = _probabilities("success", success), _probabilities("rewards", rewards)
    if v.shape != r.shape:
        raise ValueError(f"success has {len(v)} entries but rewards {len(r)}")
    alike = r * v + (1 - r) * (1 - v)

    def marginals(items: IntArray, width: int) -> FloatArray:
        same = np.repeat(alike[items, None], width, axis=1)
        same[:, 0] = 1 - alike[items]
        return np.cumprod(same, axis=1, dtype=np.float64)

    return _spend_on_prefixes(marginals, len(v), budget, max_per_prefix, cost)


def allocate_prefixes_by_tokens(
    success: ArrayLike, rewards: ArrayLike, tokens: float, cost: ArrayLike, *, max_per_prefix: int | None = None
) -> IntArray:
    """As `allocate_prefixes`, with a budget in tokens: Σ V_pref is greatest while Σ cost·k ≤ `tokens`.

    `cost` [prefixes] > 0: expected generated tokens of one continuation. A knapsack, solved by dynamic programming
    over the budget in `_TOKEN_STEPS` steps, costs rounded up: exact where budget and costs are integers and the budget
    at most `_TOKEN_STEPS`, else short of the best by what rounding wastes.
    """
    v, r = _probabilities("success", success), _probabilities("rewards", rewards)
    price = np.asarray(cost, dtype=float)
    if price.shape != v.shape or r.shape != v.shape or not (price > 0).all():
        raise ValueError(f"need as many rewards and costs > 0 as prefixes, {len(v)}")
    if not (tokens >= 0 and (max_per_prefix is None or max_per_prefix >= 0)):
        raise ValueError(f"need {tokens=} ≥ 0 and {max_per_prefix=} ≥ 0")
    worth = [
        prefix_value(value, reward, np.arange(_affordable(tokens, c, max_per_prefix) + 1))
        for value, reward, c in zip(v, r, price, strict=True)
    ]
    return _token_knapsack(worth, price, tokens)


def _affordable(tokens: float, cost: float, cap: int | None) -> int:
    most = min(int(tokens // cost), _TOKEN_STEPS)
    return most if cap is None else min(cap, most)


def _token_knapsack(worth: Sequence[FloatArray], cost: FloatArray, tokens: float) -> IntArray:
    """Counts k with the largest Σ worth[i][k_i] while Σ cost·k ≤ tokens; worth[i][0] = 0, not falling in k."""
    step = max(1.0, tokens / _TOKEN_STEPS)
    room = int(tokens / step + 1e-9)
    units = np.maximum(1, np.ceil(cost / step - 1e-9)).astype(np.int64)
    best = np.zeros(room + 1)
    chosen = np.zeros((len(worth), room + 1), dtype=np.int64)
    for item, (values, unit) in enumerate(zip(worth, units, strict=True)):
        before = best.copy()
        for k in range(1, min(len(values) - 1, room // int(unit)) + 1):
            if values[k] <= values[k - 1]:
                continue  # one more is worth nothing, like the first root rollout or all of a certain outcome
            found = before[: room + 1 - k * unit] + values[k]
            better = found > best[k * unit :] + 1e-12
            best[k * unit :][better] = found[better]
            chosen[item, k * unit :][better] = k
    counts = np.zeros(len(worth), dtype=np.int64)
    left = room
    for item in range(len(worth) - 1, -1, -1):
        counts[item] = chosen[item, left]
        left -= int(counts[item] * units[item])
    return counts


def allocate_prefixes_by_value(
    success: ArrayLike, budget: int, *, max_per_prefix: int | None = None, cost: ArrayLike | None = None
) -> IntArray:
    """As `allocate_prefixes`, blind to the outcomes: Σ 1 − V^{k+1} − (1−V)^{k+1} is greatest (METHOD 3, last lines).

    The choice then depends on nothing sampled after the prefix, so pooling the continuations with the rollout that
    passed there estimates V without bias.
    """
    v = _probabilities("success", success)
    none = np.zeros(len(v))
    return _spend_on_prefixes(
        lambda items, width: _root_marginals(v[items], none[items], 2, width), len(v), budget, max_per_prefix, cost
    )


def _spend_on_prefixes(
    marginals: Marginals, num_prefixes: int, budget: int, max_per_prefix: int | None, cost: ArrayLike | None
) -> IntArray:
    if budget < 0 or (max_per_prefix is not None and max_per_prefix < 0):
        raise ValueError(f"need {budget=} ≥ 0 and {max_per_prefix=} ≥ 0")
    cap = budget if max_per_prefix is None else min(max_per_prefix, budget)
    if cost is None:
        return spend(marginals, num_prefixes, budget, cap)
    tokens = np.asarray(cost, dtype=float)
    if tokens.shape != (num_prefixes,) or not (tokens > 0).all():
        raise ValueError(f"cost must be {num_prefixes} numbers > 0")
    return spend(lambda items, width: marginals(items, width) / tokens[items, None], num_prefixes, budget, cap)


def _probabilities(name: str, values: ArrayLike) -> FloatArray:
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or not ((array >= 0) & (array <= 1)).all():
        raise ValueError(f"{name} must be a flat array of numbers in [0, 1]")
    return array


def _uncertainty(strength: ArrayLike | None) -> FloatArray:
    """1 / (a + b) of the Beta posterior; 0 for a point estimate."""
    if strength is None:
        return np.zeros(())
    array = np.asarray(strength, dtype=float)
    if not (array > 0).all():
        raise ValueError("strength must be > 0 (pseudo rollouts behind an estimate)")
    return 1 / array
