"""Every tree that a small process can grow, with its probability: expectations without sampling.

    for probability, tree in grown_trees(process, 2, choose=by_contrast, rounds=(1, 1)): …

So what an advantage does on average can be held against the true gradient to twelve digits.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from trace_async.method.allocation import allocate_prefixes
from trace_async.method.anchors import Anchor, find_anchors, prompt_anchor
from trace_async.method.credit import NodeCredit
from trace_async.method.knapsack import FloatArray
from trace_async.trees.tree import ROOT, Node, Rollout, RolloutTree
from trace_async.types import Task, VersionSpan

TASK = Task(id="exact", domain="exact", kind="exact", data={})
Choose = Callable[[Sequence[Anchor], int], Sequence[int]]


def by_contrast(anchors: Sequence[Anchor], budget: int) -> Sequence[int]:
    """Spend it as the paper's Stage 2 does."""
    counts = allocate_prefixes([a.value for a in anchors], [a.reward for a in anchors], budget)
    return [int(count) for count in counts]


def top_up(anchors: Sequence[Anchor], budget: int) -> Sequence[int]:
    """Spend all of it on further roots of a prompt whose roots agree."""
    return [0 if anchor.depth else budget for anchor in anchors]


@dataclass(frozen=True)
class Process:
    """Turns with two actions. `chances[history]`: probability of action 0 after that history of actions.

    `success[history]`: V of a whole history. `length(history, reward)`: tokens that its last turn writes, of which the
    first is the action and the others follow without choice; it may depend on how the rollout ends. `says(history)`:
    tokens of what is observed after it.
    """

    chances: dict[tuple[int, ...], float]
    success: dict[tuple[int, ...], float]
    length: Callable[[tuple[int, ...], float], int] = lambda history, reward: 1
    says: Callable[[tuple[int, ...]], tuple[int, ...]] = lambda history: ()

    @property
    def num_turns(self) -> int:
        return len(next(iter(self.success)))

    def value(self, history: tuple[int, ...]) -> float:
        if len(history) == self.num_turns:
            return self.success[history]
        first = self.chances[history]
        # What is never taken need not be described.
        return sum(p * self.value((*history, action)) for action, p in ((0, first), (1, 1 - first)) if p)

    def gradient(self, history: tuple[int, ...] = ()) -> FloatArray:
        """∇V(history) in the log-odds of action 0 after each history, in the order of `chances`."""
        found = np.zeros(len(self.chances))
        for index, (other, first) in enumerate(self.chances.items()):
            if other[: len(history)] != history or first in (0, 1):
                continue
            reach = 1.0
            for depth in range(len(history), len(other)):
                chance = self.chances[other[:depth]]
                reach *= chance if other[depth] == 0 else 1 - chance
            found[index] = reach * first * (1 - first) * (self.value((*other, 0)) - self.value((*other, 1)))
        return found

    def endings(self, history: tuple[int, ...]) -> Iterator[tuple[float, tuple[int, ...], float]]:
        """(probability, whole history, reward) of every way to go on."""
        if len(history) == self.num_turns:
            v = self.success[history]
            yield from ((p, history, reward) for p, reward in ((v, 1.0), (1 - v, 0.0)) if p)
            return
        first = self.chances[history]
        for action, chance in ((0, first), (1, 1 - first)):
            if chance:
                for p, whole, reward in self.endings((*history, action)):
                    yield chance * p, whole, reward


@dataclass(frozen=True)
class _Growing:
    nodes: tuple[Node, ...]
    rollouts: tuple[Rollout, ...]
    histories: tuple[tuple[int, ...], ...]

    def tree(self) -> RolloutTree:
        return RolloutTree(task=TASK, nodes=self.nodes, rollouts=self.rollouts)


def grown_trees(
    process: Process, num_roots: int, *, choose: Choose = by_contrast, rounds: Sequence[int] = ()
) -> Iterator[tuple[float, RolloutTree]]:
    """Every tree of `num_roots` root rollouts and then rounds of Stage 2 with so many continuations each."""
    empty = _Growing((Node(parent=-1, rollout=-1, token_ids=(0,), num_generated=0),), (), ((),))
    for chance, tree in _grown(process, empty, 1.0, [(ROOT, 0)] * num_roots, choose, tuple(rounds), 0):
        yield chance, tree.tree()


def _grown(
    process: Process,
    tree: _Growing,
    chance: float,
    bought: Sequence[tuple[int, int]],
    choose: Choose,
    rounds: tuple[int, ...],
    number: int,
) -> Iterator[tuple[float, _Growing]]:
    """`bought`: (anchor, round) of rollouts still to be played; then `rounds`, of which the next has this number."""
    if bought:
        (anchor, bought_in), *others = bought
        for p, whole, reward in process.endings(tree.histories[anchor]):
            longer = _with_rollout(process, tree, anchor, bought_in, whole, reward)
            yield from _grown(process, longer, chance * p, others, choose, rounds, number)
    elif rounds:
        anchors = find_anchors(tree.tree())
        if choose is top_up:
            rewards = [rollout.reward for rollout in tree.rollouts if rollout.kind == "root"]
            prompt = prompt_anchor(rewards, value=process.value(()), strength=None, expected_tokens=1)
            anchors = anchors if prompt is None else [prompt, *anchors]
        counts = choose(anchors, rounds[0]) if anchors else []
        plan = [
            (a.node, number + (a.node == ROOT)) for a, count in zip(anchors, counts, strict=True) for _ in range(count)
        ]
        yield from _grown(process, tree, chance, plan, choose, rounds[1:], number + 1)
    else:
        yield chance, tree


def _with_rollout(
    process: Process, tree: _Growing, anchor: int, bought_in: int, whole: tuple[int, ...], reward: float
) -> _Growing:
    nodes, histories = list(tree.nodes), list(tree.histories)
    parent = anchor
    for turn in range(len(tree.histories[anchor]), len(whole)):
        history = whole[: turn + 1]
        n = process.length(history, reward)
        nodes.append(
            Node(
                parent=parent,
                rollout=len(tree.rollouts),
                token_ids=(history[-1],) + (9,) * (n - 1) + process.says(history),
                num_generated=n,
                logprobs=(0.0,) * n,
                version_spans=(VersionSpan(0, 0),),
                value=process.value(history),
            )
        )
        histories.append(history)
        parent = len(nodes) - 1
    rollout = Rollout(
        kind="continuation" if anchor else "root", anchor=anchor, leaf=parent, reward=reward, round=bought_in
    )
    return _Growing(tuple(nodes), (*tree.rollouts, rollout), tuple(histories))


def gradient_estimate(process: Process, tree: RolloutTree, credit: NodeCredit) -> FloatArray:
    """Σ over turns of credit·∇ log π(action | history), in the order of `Process.gradient`."""
    where = {history: index for index, history in enumerate(process.chances)}
    found = np.zeros(len(where))
    histories: list[tuple[int, ...]] = [()]
    for index, node in enumerate(tree.nodes[1:], start=1):
        before, action = histories[node.parent], node.token_ids[0]
        histories.append((*before, action))
        slope = (1 if action == 0 else 0) - process.chances[before]
        found[where[before]] += (credit.positive[index] + credit.negative[index]) * slope
    return found
