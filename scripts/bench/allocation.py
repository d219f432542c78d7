"""How long Stage 1 takes over many candidates: drawing them, the knapsack, the price.

    python -m scripts.bench.allocation --candidates 192,10000,100000,1000000

Rollouts are a third of the candidates, at most 8 a prompt, values drawn from Beta(.4, .6). What is left out is asking
the predictor, which costs a forward pass over each candidate's prompt (docs/values.md) and is measured in every run
(`time/estimate_s`). The bound is what a heap reaches that takes the units one by one from the marginals' concave
envelope; no plan can pass it. It is reached, but for rounding, unless a single unit is left over beside pairs.
"""

import argparse
import heapq
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np

from trace_async.method.allocation import allocate_roots, allocate_roots_at_price
from trace_async.run.dataset import TaskIterator
from trace_async.types import Task

T = TypeVar("T")
MOST = 8
"""Rollouts of a prompt at most."""


def timed(function: Callable[[], T]) -> tuple[T, float]:
    start = time.process_time()
    result = function()
    return result, time.process_time() - start


def worth(success: np.ndarray, counts: np.ndarray) -> float:
    """Σ V_root (docs/METHOD.md, section 2)."""
    steps = np.arange(2, MOST + 1)
    marginals = success[:, None] ** (steps - 1) * (1 - success[:, None])
    marginals = marginals + (1 - success[:, None]) ** (steps - 1) * success[:, None]
    return float((marginals * (steps <= counts[:, None])).sum())


def bound(success: np.ndarray, budget: int) -> float:
    """The value of the envelope's best `budget` marginals: u, u, u for the first three, u = v(1 − v), then V_root's."""
    heap = [(-float(v * (1 - v)), 0, float(v)) for v in success]
    heapq.heapify(heap)
    total = 0.0
    for _ in range(min(budget, MOST * len(success))):
        gain, taken, v = heap[0]
        total -= gain
        taken += 1
        if taken == MOST:
            heapq.heappop(heap)
            continue
        following = v * (1 - v) if taken < 3 else v**taken * (1 - v) + (1 - v) ** taken * v
        heapq.heapreplace(heap, (-following, taken, v))
    return total


class ManyTasks(Sequence[Task]):
    """A split whose tasks are made when they are asked for."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        return Task(id=str(index), domain="many", kind="none", data={})


def draw(count: int) -> list[Task]:
    return TaskIterator(ManyTasks(count), seed=0).pool(count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--candidates", type=lambda text: [int(n) for n in text.split(",")], default=[192, 10**4, 10**5]
    )
    args = parser.parse_args()
    print(f"{'candidates':>11}{'draw, s':>10}{'knapsack, s':>13}{'at a price, s':>15}{'bound − worth':>16}")
    for count in args.candidates:
        rng = np.random.default_rng(count)
        success, budget = rng.beta(0.4, 0.6, count), count // 3
        _, draw_s = timed(partial(draw, count))
        counts, knapsack_s = timed(partial(allocate_roots, success, budget, max_rollouts=MOST))
        tokens = np.full(count, 100.0)
        _, price_s = timed(partial(allocate_roots_at_price, success, 1e-3, tokens, max_rollouts=MOST))
        missing = bound(success, budget) - worth(success, counts)
        print(f"{count:>11,}{draw_s:>10.3f}{knapsack_s:>13.4f}{price_s:>15.4f}{missing:>16.2e}")


if __name__ == "__main__":
    main()
