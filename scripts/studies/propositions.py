"""TRACE's three propositions, selection bias and the order of prefixes, in numbers.

    python -m scripts.studies.propositions

Everything is measured on processes whose success probabilities are known exactly (scripts/studies/known_process.py).
"""

import argparse
from collections.abc import Sequence

import numpy as np

from scripts.studies.known_process import ChooseContinuations, KnownProcess, random_process
from scripts.studies.selection_bias import expanded_nodes
from trace_async.method.allocation import allocate_prefixes, allocate_prefixes_by_value, allocate_roots
from trace_async.method.credit import compute_credit
from trace_async.method.knapsack import IntArray


def by_contrast(values: Sequence[float], rewards: Sequence[float], budget: int) -> IntArray:
    return allocate_prefixes(values, rewards, budget)


def by_value(values: Sequence[float], rewards: Sequence[float], budget: int) -> IntArray:
    return allocate_prefixes_by_value(values, budget)


def mixed_pool(rng: np.random.Generator, size: int) -> list[KnownProcess]:
    """Prompts as in the paper's regime: easy, out of reach and in between."""
    return [random_process(rng, difficulty=float(d)) for d in rng.choice([-9.0, 9.0, 0.0], size=size)]


def squared_gradient_norm(
    pool: Sequence[KnownProcess], counts: IntArray, rng: np.random.Generator, *, repeats: int
) -> float:
    """E‖ĝ‖² of the leave-one-out gradient, every rollout of the update with weight 1/M; prompts share no parameter."""
    total = 0.0
    for process, m in zip(pool, counts, strict=True):
        if m >= 2:
            trees = [process.sample_tree(int(m), rng) for _ in range(repeats)]
            norms = [np.sum(process.gradient_estimate(t, compute_credit("trace", t)) ** 2) for t in trees]
            total += float(np.mean(norms)) * m**2
    return total / float(counts.sum()) ** 2


def bias_of(choose: ChooseContinuations, rng: np.random.Generator, *, num_trees: int) -> dict[str, float]:
    """Gaps between chosen, pooled and fresh outcomes at expanded nodes (selection_bias.py)."""
    pool = [random_process(rng) for _ in range(max(1, num_trees // 20))]
    trees = [p.sample_tree(4, rng, num_continuations=8, choose=choose) for p in pool for _ in range(20)]
    return expanded_nodes(trees).gaps()


def first_turn_credit(name: str, value: float, rng: np.random.Generator, *, num_trees: int) -> float:
    """Mean credit of a first turn with V = `value` in a prompt whose other first turn has V = .8; 4 roots, 8 more."""
    halves = [np.full((1, 2), 0.5), np.full((2, 2), 0.5)]
    process = KnownProcess(halves, np.array([value, value, 0.8, 0.8]))
    found: list[float] = []
    for _ in range(num_trees):
        tree = process.sample_tree(4, rng, num_continuations=8, choose=by_contrast)
        credit = compute_credit(name, tree)
        total = credit.positive + credit.negative
        found.extend(total[node] for node in tree.children[0] if tree.nodes[node].token_ids == (0,))
    return float(np.mean(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trees", type=int, default=4000, help="sampled trees per figure")
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)

    process = random_process(rng, num_turns=4)
    print("1. E[(r − V(H_t))²] after t = 0 … 4 turns:", np.round(process.expected_errors(), 4))
    gap = max(np.abs(v * (1 - v) - q).max() for v, q in zip(process.values, process.remaining_variation(), strict=True))
    print(f"2. largest |V(1 − V) − remaining quadratic variation| over all histories: {gap:.1e}")

    pool = mixed_pool(rng, 96)
    success = np.array([float(p.values[0][0]) for p in pool])
    uniform = np.where(np.arange(96) < 16, 8, 0)
    active = allocate_roots(success, 128, max_rollouts=8)
    repeats = max(1, args.trees // 200)
    norms = [squared_gradient_norm(pool, counts, rng, repeats=repeats) for counts in (uniform, active)]
    print(f"3. E‖ĝ‖²: uniform 16 × 8 {norms[0]:.5f}, active over 96 {norms[1]:.5f}, ratio {norms[1] / norms[0]:.2f}")

    for name, choose in (("contrast", by_contrast), ("contrast_value_only", by_value)):
        print(f"4. selection bias, Stage 2 {name}:")
        gaps = bias_of(choose, rng, num_trees=args.trees)
        for key in [key for key in gaps if not key.endswith("_se")]:
            print(f"     {key:<26} {gaps[key]:+.3f} ± {gaps[key + '_se']:.3f}")

    grid = (0.0, 0.1, 0.3, 0.5, 0.65, 0.8)
    print("5. mean credit of a first turn by its V", grid)
    for name in ("trace", "tree_grpo", "tree_rpo", "treepo"):
        credits = [first_turn_credit(name, value, rng, num_trees=args.trees // 4) for value in grid]
        print(f"     {name:<10}", np.round(credits, 3))


if __name__ == "__main__":
    main()
