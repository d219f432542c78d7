"""Anchors: the places of a tree where Stage 2 can spend."""

from dataclasses import dataclass

from trace_async.trees.tree import ROOT, Grown


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchor:
    """A prefix where Stage 2 can spend: a turn of a finished rollout that is not its last.

    `value`: V(H) of the history up to and including `node`; `reward`: outcome of the rollout that passed there;
    `expected_tokens`: generated tokens that a continuation is expected to cost; `depth`: turns up to and including it.
    """

    node: int
    value: float
    reward: float
    expected_tokens: float
    depth: int = 1


def find_anchors(tree: Grown) -> list[Anchor]:
    """All anchors of a tree whose nodes carry the predictor's values (a node without one counts as 0.5).

    A continuation's expected cost is the mean of what the finished rollouts generated beyond the anchor's depth.
    """
    after = _mean_tokens_after_depth(tree)
    return [
        Anchor(
            node=index,
            value=0.5 if node.value is None else node.value,
            reward=tree.rollouts[node.rollout].reward,
            expected_tokens=after[tree.depths[index]],
            depth=tree.depths[index],
        )
        for index, node in enumerate(tree.nodes)
        if index != ROOT and tree.children[index]
    ]


def _mean_tokens_after_depth(tree: Grown) -> list[float]:
    """Per depth, generated tokens beyond it, averaged over the rollouts that go on beyond it; at least 1."""
    paths = [[tree.nodes[index].num_generated for index in tree.path(rollout.leaf)] for rollout in tree.rollouts]
    means = []
    for depth in range(max(tree.depths) + 1):
        rests = [sum(path[depth + 1 :]) for path in paths if len(path) > depth + 1]
        means.append(max(1.0, sum(rests) / len(rests)) if rests else 1.0)
    return means
