"""Random finished trees for tests: deep branches, several continuations at one turn, mixed policy versions."""

import random

from trace_async.trees.tree import Node, Rollout, RolloutKind, RolloutTree
from trace_async.types import Task, VersionSpan

TASK = Task(id="t", domain="test", kind="test", data={})


def random_tree(
    rng: random.Random,
    *,
    vocab: int = 64,
    prompt_tokens: int = 6,
    roots: int = 3,
    max_turns: int = 4,
    continuations: int = 4,
    max_turn_tokens: int = 6,
    policy_version: int = 2,
    conversations: float = 0.0,
) -> RolloutTree:
    """Turns of 1 … max_turn_tokens tokens, some all generated, some a single token; continuations of continuations.

    `conversations`: how often a turn belongs to another conversation of the rollout than the turn before.
    """
    nodes = [
        Node(
            parent=-1, rollout=-1, token_ids=tuple(rng.randrange(vocab) for _ in range(prompt_tokens)), num_generated=0
        )
    ]
    rollouts: list[Rollout] = []

    def context(parent: int) -> Node:
        """A conversation of its own, one that goes on from an earlier node, or the prompt asked again."""
        line = [parent]
        while line[-1]:
            line.append(nodes[line[-1]].parent)
        follows = rng.choice([-1, -1, *line, 0])
        length = rng.randint(0 if follows == 0 else 1, max_turn_tokens)
        tokens = tuple(rng.randrange(vocab) for _ in range(length))
        return Node(parent=parent, rollout=len(rollouts), token_ids=tokens, num_generated=0, follows=follows)

    def write(anchor: int, kind: RolloutKind) -> None:
        parent = anchor
        for _ in range(rng.randint(1, max_turns)):
            if conversations and rng.random() < conversations:
                nodes.append(context(parent))
                parent = len(nodes) - 1
            nodes.append(_turn(rng, parent, len(rollouts), vocab, max_turn_tokens, policy_version))
            parent = len(nodes) - 1
        rollouts.append(Rollout(kind=kind, anchor=anchor, leaf=parent, reward=float(rng.random() < 0.5)))

    for _ in range(roots):
        write(0, "root")
    for _ in range(continuations):
        leaves = {rollout.leaf for rollout in rollouts}
        inner = [n for n in range(1, len(nodes)) if n not in leaves and nodes[n].follows is None]
        if inner:
            write(rng.choice(inner), "continuation")
    return RolloutTree(task=TASK, nodes=tuple(nodes), rollouts=tuple(rollouts), policy_version_started=policy_version)


def _turn(rng: random.Random, parent: int, rollout: int, vocab: int, max_turn_tokens: int, policy_version: int) -> Node:
    """One turn of 1 … max_turn_tokens tokens, the first of them generated, by one version or two."""
    length = rng.randint(1, max_turn_tokens)
    generated = rng.randint(1, length)
    spans = [VersionSpan(0, rng.randint(policy_version - 2, policy_version))]
    if generated > 2:
        spans.append(VersionSpan(rng.randint(1, generated - 1), policy_version))
    return Node(
        parent=parent,
        rollout=rollout,
        token_ids=tuple(rng.randrange(vocab) for _ in range(length)),
        num_generated=generated,
        logprobs=tuple(rng.uniform(-5, -3) for _ in range(generated)),
        version_spans=tuple(spans),
    )
