"""Hold the rollouts of one prompt as a tree whose nodes (turns) store only the tokens that they add.

        prompt (node 0)
        ├─ turn ─ turn ─ turn ✓        root rollout 0
        │     └── turn ─ turn ✗        continuation 2, anchored at the first turn of rollout 0
        └─ turn ─ turn ✗               root rollout 1

A node's history H is the path from the root up to and including the node; its tokens are the concatenation of the
tokens on that path. Node 0 is the prompt (depth 0); parents come before their children.

A rollout may hold several conversations, such as those of an agent that sums up its history and goes on:

        prompt ─ turn ─ turn ─ context ─ turn ─ turn ✓        context.follows = -1: its tokens begin anew

So there are two chains. `parent` leads to what came before in the rollout, and everything on that chain shares the
outcome. `before` leads to what the policy saw. The two differ only at nodes of context, in which nothing is generated
and which say where the conversation goes on from.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Literal, Protocol

from trace_async.types import HiddenState, Task, VersionSpan

ROOT = 0
RolloutKind = Literal["root", "continuation"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One turn: the policy's tokens, followed by those of the observation."""

    parent: int
    """Index of the node before it in the rollout (-1: it is the prompt)."""
    rollout: int
    """Index of the rollout that wrote it (-1: it is the prompt)."""
    token_ids: tuple[int, ...]
    num_generated: int
    """The policy generated this many of the `token_ids`, the first ones. The rest are the observation and are never
    trained on."""
    logprobs: tuple[float, ...] = ()
    """Log-probabilities of the generated tokens as the engine gave them, at the sampling temperature."""
    version_spans: tuple[VersionSpan, ...] = ()
    """The policy versions that wrote the generated tokens."""
    value: float | None = None
    """The predictor's estimate of V(H) at the time of the allocation (None: it was not asked)."""
    prompt_tokens: int = 0
    """Tokens of the prompt in the request that generated the turn."""
    cached_tokens: int = 0
    """How many of the `prompt_tokens` came from the KV cache."""
    seconds: float = field(default=0.0, compare=False)
    """From when the turn was begun to when its observation was there, waiting for engine and environment included. Of
    the first turn of a rollout, from when its environment was started or forked."""
    follows: int | None = None
    """None for a turn, which goes on from its parent. A number makes this a node of context: its tokens go on from
    those of that earlier node of the rollout (-1: they begin a conversation), and the next turn goes on from it."""

    def __post_init__(self) -> None:
        if not 0 <= self.num_generated <= len(self.token_ids):
            raise ValueError(f"num_generated {self.num_generated} is not within 0..{len(self.token_ids)}")
        if len(self.logprobs) != self.num_generated:
            raise ValueError(f"{self.num_generated} generated tokens but {len(self.logprobs)} log-probabilities")
        if self.num_generated and (not self.version_spans or self.version_spans[0].start != 0):
            raise ValueError("version_spans must start at token 0")
        if self.follows is not None and self.num_generated:
            raise ValueError("a node of context (follows) holds nothing that was generated")
        if self.follows == -1 and not self.token_ids:
            raise ValueError("a conversation begins with tokens")

    @property
    def before(self) -> int:
        """The node whose tokens these go on from (-1: none)."""
        return self.parent if self.follows is None else self.follows


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """A finished rollout: a chain of nodes of its own below `anchor`, which ends at `leaf`."""

    kind: RolloutKind
    anchor: int
    """The node that it starts after: node 0 for a root rollout, a turn for a continuation."""
    leaf: int
    reward: float
    """The verifier's reward, in [0, 1]."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    round: int = 0
    """When it was bought. A continuation: the round of Stage 2, counted from 0. A root rollout: 0 when Stage 1 gave it,
    r + 1 when round r of Stage 2 did. Its credit may depend only on what was known before that round."""

    @property
    def from_stage1(self) -> bool:
        return self.kind == "root" and self.round == 0


@dataclass(frozen=True, slots=True)
class Fault:
    """How often something broke down."""

    count: int
    words: str
    """The error message of the first time."""


class Grown(Protocol):
    """What a finished tree (`RolloutTree`) and a growing one (`TreeBuilder`) have in common."""

    @property
    def nodes(self) -> Sequence[Node]: ...
    @property
    def rollouts(self) -> Sequence[Rollout]: ...
    @property
    def children(self) -> Sequence[Sequence[int]]: ...
    @property
    def depths(self) -> Sequence[int]: ...
    def path(self, node: int) -> Sequence[int]: ...


@dataclass(frozen=True, kw_only=True)
class RolloutTree:
    """All finished rollouts of one prompt. It cannot change, and it is checked when it is made."""

    task: Task
    nodes: tuple[Node, ...]
    """Node 0 is the prompt; every parent stands before its children."""
    rollouts: tuple[Rollout, ...]
    policy_version_started: int = 0
    """The learner's version when the prompt was admitted."""
    num_roots_allocated: int = 0
    """Root rollouts that Stage 1 gave."""
    num_continuations_allocated: int = 0
    """Rollouts that Stage 2 gave: continuations, or further root rollouts."""
    failures: Mapping[str, int] = field(default_factory=dict)
    """Kind of loss → number of rollouts lost that way."""
    faults: Mapping[str, Fault] = field(default_factory=dict)
    """Everything that broke down, by method and kind (such as `step.env_timeout`). This includes faults after which
    another try succeeded."""
    states: Mapping[int, HiddenState] = field(default_factory=dict, compare=False, repr=False)
    """Node → the policy's hidden state at the end of its history, where the engine gave it. Not saved."""

    def __post_init__(self) -> None:
        if not self.nodes or self.nodes[ROOT].parent != -1 or self.nodes[ROOT].num_generated:
            raise ValueError("node 0 must be the prompt: parent -1, nothing generated")
        for index, node in enumerate(self.nodes[1:], start=1):
            if not 0 <= node.parent < index:
                raise ValueError(f"node {index}: parent {node.parent} must come before it")
            if not 0 <= node.rollout < len(self.rollouts):
                raise ValueError(f"node {index}: there is no rollout {node.rollout}")
            if node.follows is not None and node.follows != -1 and node.follows not in self.path(node.parent):
                raise ValueError(f"node {index}: it follows {node.follows}, which is not earlier in its rollout")
        owned = [0] * len(self.rollouts)
        for node in self.nodes[1:]:
            owned[node.rollout] += 1
        for r, rollout in enumerate(self.rollouts):
            fresh = self.fresh_nodes(r)
            if not fresh or len(fresh) != owned[r]:
                raise ValueError(f"rollout {r}: its nodes must be one chain from its anchor to its leaf")
            if (rollout.kind == "root") != (rollout.anchor == ROOT):
                raise ValueError(f"rollout {r}: exactly root rollouts are anchored at the prompt")
            if self.children[rollout.leaf]:
                raise ValueError(f"rollout {r}: its last node {rollout.leaf} has children")
            if rollout.round < 0:
                raise ValueError(f"rollout {r}: round {rollout.round} must be ≥ 0")

    def __reduce__(self) -> tuple[Callable[..., "RolloutTree"], tuple[object, ...]]:
        """Pickle the nodes as arrays, and none of the cached properties."""
        from trace_async.trees.packed import pack_nodes, unpack_tree

        others = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("nodes", "rollouts")}
        return unpack_tree, (pack_nodes(self.nodes), self.rollouts, others)

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Per node, the indices of its children, ascending."""
        found: list[list[int]] = [[] for _ in self.nodes]
        for index, node in enumerate(self.nodes[1:], start=1):
            found[node.parent].append(index)
        return tuple(tuple(c) for c in found)

    @cached_property
    def token_children(self) -> tuple[tuple[int, ...], ...]:
        """Per node, the nodes whose tokens go on from its own, ascending.

        One more entry, the last, lists the nodes that begin a conversation, with the prompt first.
        """
        found: list[list[int]] = [[] for _ in range(len(self.nodes) + 1)]
        for index, node in enumerate(self.nodes):
            # -1, before a node that begins a conversation, indexes the extra entry at the end.
            found[node.before].append(index)
        return tuple(tuple(c) for c in found)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Per node, the number of turns up to and including it (0: the prompt)."""
        depths = [0] * len(self.nodes)
        for index, node in enumerate(self.nodes[1:], start=1):
            depths[index] = depths[node.parent] + 1
        return tuple(depths)

    @cached_property
    def leaf_rewards(self) -> Mapping[int, float]:
        """Leaf node → reward."""
        return {rollout.leaf: rollout.reward for rollout in self.rollouts}

    @cached_property
    def num_leaves(self) -> tuple[int, ...]:
        """Per node, the number of leaves under it (n_y; a leaf has 1)."""
        counts = [0] * len(self.nodes)
        for leaf in self.leaf_rewards:
            counts[leaf] = 1
        # Backwards, every node comes after all its children, so its count is complete when its parent takes it.
        for index in range(len(self.nodes) - 1, 0, -1):
            counts[self.nodes[index].parent] += counts[index]
        return tuple(counts)

    def path(self, node: int) -> tuple[int, ...]:
        """Return the node indices from the prompt to `node`, both included."""
        path = [node]
        while path[-1] != ROOT:
            path.append(self.nodes[path[-1]].parent)
        return tuple(reversed(path))

    def token_path(self, node: int) -> tuple[int, ...]:
        """Return the nodes whose tokens the policy saw up to the end of `node`, in order.

        This is its path, unless the rollout holds several conversations.
        """
        path = [node]
        while (before := self.nodes[path[-1]].before) >= 0:
            path.append(before)
        return tuple(reversed(path))

    def prefix_tokens(self, node: int) -> tuple[int, ...]:
        """Return all tokens that the policy saw up to and including `node`."""
        return tuple(token for index in self.token_path(node) for token in self.nodes[index].token_ids)

    def fresh_nodes(self, rollout: int) -> tuple[int, ...]:
        """Return the nodes that `rollout` itself wrote, in order of turns; empty if they are not one chain."""
        fresh = []
        node = self.rollouts[rollout].leaf
        while node != self.rollouts[rollout].anchor and node != ROOT:
            if self.nodes[node].rollout != rollout:
                return ()
            fresh.append(node)
            node = self.nodes[node].parent
        return tuple(reversed(fresh)) if node == self.rollouts[rollout].anchor else ()

    def branches(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Yield (rollout index, its root-to-leaf path) for every rollout."""
        for index, rollout in enumerate(self.rollouts):
            yield index, self.path(rollout.leaf)

    @property
    def has_both_outcomes(self) -> bool:
        """Whether the rewards of the leaves differ. Only then does a group-relative update learn from this prompt."""
        rewards = [rollout.reward for rollout in self.rollouts]
        return bool(rewards) and min(rewards) < max(rewards)

    @property
    def num_generated_tokens(self) -> int:
        return sum(node.num_generated for node in self.nodes)

    @property
    def num_unique_tokens(self) -> int:
        return sum(len(node.token_ids) for node in self.nodes)

    @property
    def oldest_policy_version(self) -> int:
        """The oldest version that wrote a token of the tree, or the version at admission if it has none."""
        versions = [span.policy_version for node in self.nodes for span in node.version_spans]
        return min(versions, default=self.policy_version_started)

    @property
    def trajectory_equivalents(self) -> float:
        """The cost of the tree as the paper counts it: 1 for a root rollout, one half for a continuation."""
        return sum(1.0 if rollout.kind == "root" else 0.5 for rollout in self.rollouts)
