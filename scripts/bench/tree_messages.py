"""What a tree costs on its way between processes: bytes and processor time a token, packed and as plain objects.

    python -m scripts.bench.tree_messages --trees 1000 --tokens 4096

The trees have 16 rollouts of 4 turns, three quarters of their tokens generated, float32 log-probabilities. "packed" is
how trees travel (trace_async/trees/packed.py); "objects" is how Python pickles their nodes by itself.
"""

import argparse
import pickle
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from trace_async.trees.tree import Node, Rollout, RolloutTree
from trace_async.types import Task, VersionSpan

ROLLOUTS, TURNS = 16, 4


def make_tree(rng: random.Random, num_tokens: int) -> RolloutTree:
    """Return a prompt and root rollouts; together about `num_tokens` tokens."""
    length = num_tokens // (ROLLOUTS * TURNS + 1)
    nodes = [Node(parent=-1, rollout=-1, token_ids=_ids(rng, length), num_generated=0)]
    rollouts = []
    for rollout in range(ROLLOUTS):
        parent = 0
        for _ in range(TURNS):
            generated = length * 3 // 4
            nodes.append(
                Node(
                    parent=parent,
                    rollout=rollout,
                    token_ids=_ids(rng, length),
                    num_generated=generated,
                    logprobs=tuple(float(np.float32(-rng.random())) for _ in range(generated)),
                    version_spans=(VersionSpan(0, 3),),
                )
            )
            parent = len(nodes) - 1
        rollouts.append(Rollout(kind="root", anchor=0, leaf=parent, reward=float(rng.random() < 0.5)))
    task = Task(id="t", domain="d", kind="k", data={})
    return RolloutTree(task=task, nodes=tuple(nodes), rollouts=tuple(rollouts))


def _ids(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(150_000) for _ in range(count))


def measure(name: str, things: Sequence[Any], num_tokens: int, load: Callable[[bytes], Any] = pickle.loads) -> None:
    started = time.process_time()
    messages = [pickle.dumps(thing, protocol=5) for thing in things]
    dumped = time.process_time()
    for message in messages:
        load(message)
    loaded = time.process_time()
    size = sum(map(len, messages))
    print(
        f"{name:<10}{size / num_tokens:>14.2f}{1e6 * (dumped - started) / num_tokens:>14.4f}"
        f"{1e6 * (loaded - dumped) / num_tokens:>14.4f}{loaded - dumped:>12.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trees", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=4096, help="of a tree")
    args = parser.parse_args()
    rng = random.Random(0)
    trees = [make_tree(rng, args.tokens) for _ in range(args.trees)]
    num_tokens = sum(tree.num_unique_tokens for tree in trees)
    print(f"{len(trees)} trees, {num_tokens} tokens")
    print(f"{'':<10}{'bytes/token':>14}{'dump µs/token':>14}{'load µs/token':>14}{'load s':>12}")
    measure("objects", [(tree.task, tree.nodes, tree.rollouts) for tree in trees], num_tokens)
    measure("packed", trees, num_tokens)


if __name__ == "__main__":
    main()
