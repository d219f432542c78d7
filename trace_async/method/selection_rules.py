"""The rules TRACE is compared with: which prompts get rollouts (Stage 1) and which prefixes (Stage 2).

All spend the same budget M = `budget` root rollouts, in groups of n = `group` where the rule has a fixed group size.
They return integer counts over the pool's prompts; a prompt with 0 is skipped for this round.
"""

import numpy as np

from trace_async.method.marginals import FloatArray, IntArray, hand_out, spend


def uniform_roots(num_prompts: int, budget: int, *, group: int, cap: int) -> IntArray:
    """GRPO: the first prompts of the pool (drawn at random) get `group` each; also DAPO before its filter.

    What does not fill a group goes to the next prompt if it is at least 2, else on top of the first prompts, as it
    does when the pool is too small for the budget; at most `cap` each.
    """
    return _groups(np.arange(num_prompts), budget, group=group, cap=cap)


def nearest_half_roots(success: FloatArray, budget: int, *, group: int, cap: int) -> IntArray:
    """`group` rollouts for each of the prompts whose `success` is nearest 0.5.

    With the value model's estimates over a pool of k·m candidates: PCL (arXiv 2510.01135). With one draw from each
    prompt's Beta posterior: the Thompson sampling of MoPPS (arXiv 2507.04632), target 0.5.
    """
    return _groups(np.argsort(np.abs(success - 0.5), kind="stable"), budget, group=group, cap=cap)


def variance_optimal_roots(success: FloatArray, budget: int, *, group: int, cap: int) -> IntArray:
    """VIP (arXiv 2602.01601): spread the batch's budget so that the gradient's variance is least.

    The leave-one-out estimator of prompt i has variance a_i/(n_i − 1), a_i = v_i(1−v_i); under Σ n_i = M the optimum is
    n* = 1 + sqrt(a/λ). Here exactly in integers: one more rollout saves a/((n−1)n), falling in n. VIP chooses counts,
    not prompts: the batch is the first M/`group` prompts of the pool, each with at least 2.
    """
    batch = min(len(success), max(1, budget // group))
    a = (success * (1 - success))[:batch]
    least = min(2, cap, budget // batch)

    def savings(items: IntArray, width: int) -> FloatArray:
        n = np.arange(2, width + 2)
        return a[items, None] / ((n - 1) * n)

    counts = np.zeros(len(success), dtype=np.int64)
    counts[:batch] = least + spend(savings, batch, budget - least * batch, cap - least)
    return counts + hand_out(cap - counts, budget - int(counts.sum()))


def random_prefixes(num_prefixes: int, budget: int, *, cap: int | None, rng: np.random.Generator) -> IntArray:
    """Tree-GRPO, TreePO as in TRACE's tables: non-terminal turns drawn at random, with replacement up to `cap`."""
    if cap is None:
        return rng.multinomial(budget, np.full(num_prefixes, 1 / num_prefixes)) if num_prefixes else np.zeros(0, int)
    slots = rng.permutation(np.repeat(np.arange(num_prefixes), min(cap, budget)))[:budget]
    return np.bincount(slots, minlength=num_prefixes)


def _groups(order: IntArray, budget: int, *, group: int, cap: int) -> IntArray:
    """Groups for the prompts in `order`, best first, until `budget` is spent or all have `cap`."""
    group = min(group, cap)
    ranked = hand_out(np.full(len(order), group), budget)
    if (lone := np.flatnonzero(ranked == 1)).size and group > 1 and cap > group and ranked[0] == group:
        ranked[lone] = 0
    ranked = ranked + hand_out(cap - ranked, budget - int(ranked.sum()))
    counts = np.zeros(len(order), dtype=np.int64)
    counts[order] = ranked
    return counts
