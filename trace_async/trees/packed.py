"""Pack a tree for its way between processes: a few arrays in place of a Python object for every token.

A tree is sent from its PromptActor to the driver, and from there to the learner's ranks and the predictor. Pickling its
tuples costs a tag and up to eight bytes for every number. Here ids are int32, log-probabilities float32 where that is
exact (engines compute them so) and else float64. So nothing is rounded: the tree that arrives is equal to the one that
was sent, and is checked like every tree when it is made.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import numpy as np

from trace_async.trees.tree import Node, Rollout, RolloutTree
from trace_async.types import VersionSpan

_NO_NODE = -2
"""Stands for `follows=None` in a row of `nodes`, where -1 has a meaning of its own."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedNodes:
    """All nodes of a tree, of N nodes, T tokens, G generated tokens and S spans."""

    rows: np.ndarray
    """int32 [N, 8]: parent, rollout, number of tokens, of generated ones and of spans, prompt tokens, cached ones,
    follows."""
    values: np.ndarray
    """float64 [N, 2]: value (NaN for None) and seconds."""
    token_ids: np.ndarray
    """int32 [T], node after node."""
    logprobs: np.ndarray
    """float32 or float64 [G], node after node."""
    spans: np.ndarray
    """int32 [S, 2]: start and policy version, node after node."""


def pack_nodes(nodes: Iterable[Node]) -> PackedNodes:
    """Return the nodes as arrays. Raises OverflowError for a token id beyond 2³¹."""
    nodes = tuple(nodes)
    exact = np.fromiter(chain.from_iterable(node.logprobs for node in nodes), np.float64)
    short = exact.astype(np.float32)
    spans = [(span.start, span.policy_version) for node in nodes for span in node.version_spans]
    return PackedNodes(
        rows=np.array([_row(node) for node in nodes], np.int32),
        values=np.array([(np.nan if n.value is None else n.value, n.seconds) for n in nodes], np.float64),
        token_ids=np.fromiter(chain.from_iterable(node.token_ids for node in nodes), np.int32),
        logprobs=short if np.array_equal(short.astype(np.float64), exact) else exact,
        spans=np.array(spans, np.int32).reshape(-1, 2),
    )


def _row(node: Node) -> tuple[int, ...]:
    return (
        node.parent,
        node.rollout,
        len(node.token_ids),
        node.num_generated,
        len(node.version_spans),
        node.prompt_tokens,
        node.cached_tokens,
        _NO_NODE if node.follows is None else node.follows,
    )


def unpack_nodes(packed: PackedNodes) -> tuple[Node, ...]:
    """Return the nodes that were packed, equal to what they were."""
    token_ids, logprobs = tuple(packed.token_ids.tolist()), tuple(packed.logprobs.tolist())
    spans = [VersionSpan(start, version) for start, version in packed.spans.tolist()]
    nodes = []
    token = logprob = span = 0
    for row, (value, seconds) in zip(packed.rows.tolist(), packed.values.tolist(), strict=True):
        parent, rollout, num_tokens, num_generated, num_spans, prompt_tokens, cached_tokens, follows = row
        nodes.append(
            Node(
                parent=parent,
                rollout=rollout,
                token_ids=token_ids[token : token + num_tokens],
                num_generated=num_generated,
                logprobs=logprobs[logprob : logprob + num_generated],
                version_spans=tuple(spans[span : span + num_spans]),
                value=None if value != value else value,
                prompt_tokens=prompt_tokens,
                cached_tokens=cached_tokens,
                seconds=seconds,
                follows=None if follows == _NO_NODE else follows,
            )
        )
        token, logprob, span = token + num_tokens, logprob + num_generated, span + num_spans
    return tuple(nodes)


def unpack_tree(nodes: PackedNodes, rollouts: tuple[Rollout, ...], others: dict[str, object]) -> RolloutTree:
    """Make a tree from its packed nodes; `others` are its further fields by name. What unpickling calls."""
    return RolloutTree(nodes=unpack_nodes(nodes), rollouts=rollouts, **others)  # type: ignore[arg-type]
