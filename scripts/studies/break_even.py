"""When does a continuation beat a new root rollout? On processes where everything is known, with the product's credit.

    python -m scripts.studies.break_even [--trees 1500]

Six turns of two actions, each right with ½; the chance of success is a sigmoid of the weighted right turns, so that the
outcome is decided early, late or evenly, of prompts that are even (p = .5) or hard (p = .1). The policy has one logit a
turn. What a prompt teaches is J²/N, J the mean of its gradient along the true one, N its variance: with credit `trace`,
for m root rollouts with K continuations of each after turn d, and for roots alone. The share of the cost before the
fork, s, at which both teach as much for their cost is the measured break-even: above it continuations win, in whatever
unit the cost is counted, tokens or seconds. Beside it stand two predictions:

    2ρ/(1+ρ)                      two-stage sampling: a second leaf as a second estimate of the prompt's *value*
    `payoff.break_even(ρ, …)`     of the *gradient*
"""

import argparse
from collections.abc import Sequence

import numpy as np

from scripts.studies.known_process import KnownProcess
from trace_async.method.credit import compute_credit
from trace_async.method.knapsack import FloatArray, IntArray
from trace_async.method.stage2.payoff import break_even

TURNS = 6
DESIGNS = ((4, 1), (2, 3))
"""Root rollouts m and continuations K of each."""
SHAPES = {
    "early": (3.0, 0.6, 0.6, 0.6, 0.6, 0.6),
    "even": (1.3, 1.3, 1.3, 1.3, 1.3, 1.3),
    "late": (0.6, 0.6, 0.6, 0.6, 0.6, 3.0),
}
"""How much each turn weighs."""


def make_process(weights: Sequence[float], success: float) -> KnownProcess:
    """With this mean success, found by bisection."""
    right = np.array([[1 - (index >> turn & 1) for turn in range(TURNS)][::-1] for index in range(2**TURNS)])
    score = (2 * right - 1) @ np.array(weights)
    low, high = -40.0, 40.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _sigmoid(score + middle).mean() < success else (low, middle)
    policy = [np.full((2**turn, 2), 0.5) for turn in range(TURNS)]
    return KnownProcess(policy, _sigmoid(score + low))


def _sigmoid(x: FloatArray) -> FloatArray:
    return np.asarray(1 / (1 + np.exp(-x)))


def decided(process: KnownProcess, depth: int) -> float:
    """ρ: share of the outcome's variance that `depth` turns have decided."""
    p = float(process.values[0][0])
    return float((process.reach[depth] * (process.values[depth] - p) ** 2).sum() / (p * (1 - p)))


def by_turn(gradient: FloatArray) -> FloatArray:
    """In the logit of the right action of each turn, whatever came before."""
    parts = np.split(gradient, np.cumsum([2 ** (turn + 1) for turn in range(TURNS - 1)]))
    return np.array([(part.reshape(-1, 2)[:, 0] - part.reshape(-1, 2)[:, 1]).sum() / 2 for part in parts])


def teaches(
    process: KnownProcess, num_roots: int, num_trees: int, seed: int, *, depth: int = 0, per_root: int = 0
) -> float:
    """J²/N of a prompt's gradient. `depth` > 0: each root has `per_root` continuations after so many turns."""
    rng = np.random.default_rng(seed)

    def after_depth(values: Sequence[float], rewards: Sequence[float], budget: int) -> IntArray:
        counts = np.zeros(len(values), dtype=np.int64)
        counts[depth - 1 :: TURNS - 1] = per_root  # every root has an anchor a turn, but for its last
        return counts

    estimates = []
    for _ in range(num_trees):
        tree = process.sample_tree(num_roots, rng, choose=after_depth if depth else None)
        estimates.append(by_turn(process.gradient_estimate(tree, compute_credit("trace", tree))))
    found, truth = np.array(estimates), by_turn(process.gradient())
    along = float(found.mean(axis=0) @ truth / np.linalg.norm(truth))
    return along**2 / float(found.var(axis=0, ddof=1).sum())


def measured_break_even(forked: float, roots: Sequence[int], alone: Sequence[float], m: int, k: int) -> float:
    """The s at which m roots with k continuations each, m·(1 + k·(1 − s)) roots' cost, teach as much as roots alone.

    `alone`: what so many `roots` teach. Below 0: always; above 1: never.
    """
    slope, level = np.polyfit(roots, alone, 1)
    return float(1 - ((forked - level) / slope - m) / (m * k))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trees", type=int, default=1500)
    args = parser.parse_args()
    print("| decided | p | m, K | after turn | ρ | s, turns alike | 2ρ/(1+ρ) | of the gradient | measured |")
    print("|---|---|---|---|---|---|---|---|---|")
    right, cells = [0, 0], 0
    sizes = range(2, 9)
    for shape, weights in SHAPES.items():
        for success in (0.5, 0.1):
            process = make_process(weights, success)
            of_all = decided(process, TURNS)
            alone = [teaches(process, m, args.trees, seed=m) for m in sizes]
            for m, k in DESIGNS:
                for depth in range(1, TURNS):
                    rho, s = decided(process, depth), depth / TURNS
                    forked = teaches(process, m, args.trees, seed=99, depth=depth, per_root=k)
                    measured = measured_break_even(forked, sizes, alone, m, k)
                    said = (2 * rho / (1 + rho), break_even(rho, s, m, k, decided_by_all=of_all))
                    right = [r + ((s > at) == (s > measured)) for r, at in zip(right, said, strict=True)]
                    cells += 1
                    print(
                        f"| {shape} | {success} | {m}, {k} | {depth} | {rho:.2f} | {s:.2f} | {said[0]:.2f} "
                        f"| {said[1]:.2f} | {measured:.2f} |",
                        flush=True,
                    )
    print(f"\nWho wins, said right of {cells}: 2ρ/(1+ρ) {right[0]}, of the gradient {right[1]}.")


if __name__ == "__main__":
    main()
