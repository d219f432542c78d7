"""Anchors: the places of a tree where Stage 2 can spend."""

from collections.abc import Sequence
from dataclasses import dataclass

from trace_async.trees.tree import ROOT, Grown


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchor:
    """Where Stage 2 can spend: after a turn of a finished rollout that is not its last, or again at the prompt."""

    node: int
    value: float
    """V(H) of the history up to and including `node`."""
    reward: float
    """Outcome of the rollout that passed there. At the prompt: of all its root rollouts, which agree."""
    expected_tokens: float
    """Generated tokens that a rollout from here is expected to cost."""
    depth: int = 1
    """Turns up to and including it; 0: the prompt."""
    strength: float | None = None
    """Pseudo rollouts behind `value`, which is then the mean of a Beta posterior. None: it is taken as known."""


def prompt_anchor(
    rewards: Sequence[float], *, value: float | None, strength: float | None, expected_tokens: float
) -> Anchor | None:
    """The prompt as a place for further root rollouts. None: it has none, or two that differ, so nothing is open.

    `value`, `strength`: what was believed of it before its `rewards` were known; None: nothing (Beta(1, 1)).
    """
    if not rewards or min(rewards) < max(rewards):
        return None
    prior = 2.0 if value is None or strength is None else strength
    after = prior + len(rewards)
    return Anchor(
        node=ROOT,
        value=(prior * (0.5 if value is None else value) + sum(rewards)) / after,
        reward=rewards[0],
        expected_tokens=max(1.0, expected_tokens),
        depth=0,
        strength=after,
    )


def find_anchors(tree: Grown) -> list[Anchor]:
    """All anchors of a tree whose nodes carry the predictor's values (a node without one counts as 0.5).

    A continuation's expected cost is the mean of what the rollouts of Stage 1 generated beyond the anchor's depth, or,
    where none of them came so far, all rollouts.
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
    every = [[tree.nodes[index].num_generated for index in tree.path(rollout.leaf)] for rollout in tree.rollouts]
    first = [path for path, rollout in zip(every, tree.rollouts, strict=True) if rollout.from_stage1]
    means = []
    for depth in range(max(tree.depths) + 1):
        going_on = [path for path in first if len(path) > depth + 1] or [p for p in every if len(p) > depth + 1]
        rests = [sum(path[depth + 1 :]) for path in going_on]
        means.append(max(1.0, sum(rests) / len(rests)) if rests else 1.0)
    return means
