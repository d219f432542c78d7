"""A small process whose success probabilities are known exactly: to show TRACE's propositions in numbers.

A prompt is a full tree of turns: at each history one of `num_actions` actions is drawn by a tabular softmax policy;
after `num_turns` turns the rollout succeeds with a known probability. So V(H), the policy's gradient and every
expectation can be written down, and what an estimator does can be held against the truth.
"""

from collections.abc import Callable, Sequence

import numpy as np

from trace_async.method.anchors import find_anchors
from trace_async.method.credit import NodeCredit
from trace_async.method.knapsack import FloatArray, IntArray
from trace_async.trees.builder import Branch, TreeBuilder
from trace_async.trees.tree import ROOT, Node, RolloutTree
from trace_async.types import Completion, Task, VersionSpan

# (values of the anchors, outcomes of the rollouts that passed there, budget) → continuations of each anchor.
ChooseContinuations = Callable[[Sequence[float], Sequence[float], int], IntArray]


class KnownProcess:
    """One prompt. `policy[t]` [A^t, A]: action probabilities at each history of t turns; `values[t]` [A^t]: V(H)."""

    def __init__(self, policy: Sequence[FloatArray], success: FloatArray) -> None:
        self.policy = list(policy)
        self.num_turns = len(self.policy)
        self.num_actions = self.policy[0].shape[1]
        self.values = [np.asarray(success, dtype=float)]
        for probabilities in reversed(self.policy):
            below = self.values[0].reshape(-1, self.num_actions)
            self.values.insert(0, (probabilities * below).sum(axis=1))
        self.reach = [np.ones(1)]
        for probabilities in self.policy:
            self.reach.append((self.reach[-1][:, None] * probabilities).reshape(-1))

    def expected_errors(self) -> FloatArray:
        """E[(r − V(H_t))²] = E[V(H_t)(1 − V(H_t))] for t = 0 … num_turns: what is left to be known after t turns."""
        return np.array([(p * v * (1 - v)).sum() for p, v in zip(self.reach, self.values, strict=True)])

    def remaining_variation(self) -> list[FloatArray]:
        """Per depth [A^t]: E[Σ_{s≥t} (V_{s+1} − V_s)² | H_t], the last jump being to the reward itself."""
        variation = [self.values[-1] * (1 - self.values[-1])]
        for t in range(self.num_turns - 1, -1, -1):
            jumps = (self.values[t + 1].reshape(-1, self.num_actions) - self.values[t][:, None]) ** 2
            below = variation[0].reshape(-1, self.num_actions)
            variation.insert(0, (self.policy[t] * (jumps + below)).sum(axis=1))
        return variation

    def gradient(self) -> FloatArray:
        """∇V(prompt) in the logits of all histories, flat: P(H)·π(a|H)·(V(Ha) − V(H))."""
        parts = [
            reach[:, None] * p * (below.reshape(-1, self.num_actions) - v[:, None])
            for reach, p, v, below in zip(self.reach[:-1], self.policy, self.values[:-1], self.values[1:], strict=True)
        ]
        return np.concatenate([part.reshape(-1) for part in parts])

    def sample_tree(
        self,
        num_roots: int,
        rng: np.random.Generator,
        *,
        num_continuations: int = 0,
        choose: ChooseContinuations | None = None,
    ) -> RolloutTree:
        """Root rollouts, then continuations where `choose` puts them; a turn's one token is its action."""
        builder = TreeBuilder(
            Task(id="known", domain="known", kind="known", data={}), root_value=float(self.values[0][0])
        )
        builder.set_prompt((0,))
        for _ in range(num_roots):
            self._roll(builder, Branch("root", ROOT), rng)
        if choose is not None:
            anchors = find_anchors(builder)
            counts = choose([a.value for a in anchors], [a.reward for a in anchors], num_continuations)
            for anchor, count in zip(anchors, counts, strict=True):
                for _ in range(count):
                    self._roll(builder, Branch("continuation", anchor.node), rng)
        return builder.tree()

    def _roll(self, builder: TreeBuilder, branch: Branch, rng: np.random.Generator) -> None:
        actions = _actions(builder.nodes, branch.anchor)
        values = []
        while len(actions) < self.num_turns:
            probabilities = self.policy[len(actions)][self._index(actions)]
            actions.append(int(rng.choice(self.num_actions, p=probabilities)))
            values.append(float(self.values[len(actions)][self._index(actions)]))
            branch.append(
                Completion(
                    token_ids=(actions[-1],),
                    logprobs=(float(np.log(probabilities[actions[-1]])),),
                    version_spans=(VersionSpan(0, 0),),
                    finish_reason="stop",
                    prompt_tokens=0,
                    cached_tokens=0,
                ),
                (),
            )
        reward = float(rng.random() < self.values[-1][self._index(actions)])
        for node, value in zip(builder.add(branch, reward, {}), values, strict=True):
            builder.set_value(node, value)

    def _index(self, actions: Sequence[int]) -> int:
        """Where a history stands among those of its length."""
        index = 0
        for action in actions:
            index = index * self.num_actions + action
        return index

    def gradient_estimate(self, tree: RolloutTree, credit: NodeCredit) -> FloatArray:
        """Σ over turns of credit·∇ log π(action | history), flat like `gradient`."""
        parts = [np.zeros_like(p) for p in self.policy]
        for node in range(1, len(tree.nodes)):
            actions = _actions(tree.nodes, node)
            t, h = len(actions) - 1, self._index(actions[:-1])
            total = credit.positive[node] + credit.negative[node]
            parts[t][h] -= total * self.policy[t][h]
            parts[t][h, actions[-1]] += total
        return np.concatenate([part.reshape(-1) for part in parts])


def _actions(nodes: Sequence[Node], node: int) -> list[int]:
    actions: list[int] = []
    while node != ROOT:
        actions.append(nodes[node].token_ids[0])
        node = nodes[node].parent
    return actions[::-1]


def random_process(
    rng: np.random.Generator, *, num_turns: int = 3, num_actions: int = 3, difficulty: float = 0.0
) -> KnownProcess:
    """Random logits; leaves succeed with sigmoid(normal·3 − difficulty), so that values spread from 0 to 1."""
    policy = []
    for t in range(num_turns):
        weights = np.exp(rng.normal(size=(num_actions**t, num_actions)))
        policy.append(weights / weights.sum(axis=1, keepdims=True))
    logits = 3 * rng.normal(size=num_actions**num_turns) - difficulty
    return KnownProcess(policy, 1 / (1 + np.exp(-logits)))
