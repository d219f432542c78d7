"""GiGPO (arXiv 2505.10978): credit for a turn without forks, by comparing turns that began in the same state."""

from collections import defaultdict

import numpy as np

from trace_async.method.credit.groups import centred, std
from trace_async.method.credit.rule import EPSILON, CreditRule, Term
from trace_async.method.knapsack import FloatArray
from trace_async.trees.tree import ROOT, RolloutTree


class GiGpo(CreditRule):
    """Root rollouts only: A of a turn = (r − mean over the prompt) + (r − mean over its state), weight 1/m.

    The first part is GRPO's. The second compares the outcomes of all turns of the prompt that began in the same state;
    it is 0 for a turn to whose state nobody else came. Two turns begin in the same state when the same observation
    stands before them: the paper hashes the environment's own state, which few environments show. Unlike there, later
    rewards are not discounted, so that equal outcomes give no credit. `normalize_std`: each group over (std + 1e-6),
    std with n − 1.
    """

    normalizes = True

    def terms(self, tree: RolloutTree) -> list[Term]:
        roots = [rollout for rollout in tree.rollouts if rollout.kind == "root"]
        paths = [[n for n in tree.path(rollout.leaf) if tree.nodes[n].num_generated] for rollout in roots]
        of_prompt = self._compared(np.array([rollout.reward for rollout in roots]))
        states: dict[tuple[int, ...], list[tuple[int, float]]] = defaultdict(list)
        for path, rollout in zip(paths, roots, strict=True):
            for node in path:
                states[_state(tree, node)].append((node, rollout.reward))
        of_state: dict[int, float] = {}
        for group in states.values():
            advantages = self._compared(np.array([reward for _, reward in group]))
            of_state |= {node: float(a) for (node, _), a in zip(group, advantages, strict=True)}
        return [
            Term((node,), float(own) + of_state[node], 1 / len(roots))
            for path, own in zip(paths, of_prompt, strict=True)
            for node in path
        ]

    def _compared(self, values: FloatArray) -> FloatArray:
        return centred(values) / (std(values) + EPSILON if self.normalize_std else 1.0)


def _state(tree: RolloutTree, node: int) -> tuple[int, ...]:
    """The tokens that the environment said last before this turn; of a first turn the prompt's."""
    before = tree.nodes[node].before
    return tree.nodes[before].token_ids[0 if before == ROOT else tree.nodes[before].num_generated :]
