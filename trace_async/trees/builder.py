"""Grow a rollout tree in place, so that an anchor can name a node by its index.

        builder = TreeBuilder(task)             node 0 is the task's prompt
        branch = Branch("root", ROOT)           a rollout under way; nobody else sees it
        branch.append(completion, observation)  once per turn
        builder.add(branch, reward, metrics)    its turns become nodes, and it becomes a rollout
        builder.tree()                          the finished tree, checked

A rollout enters the tree only when its reward is known. So one that broke down leaves nothing behind.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from trace_async.trees.tree import ROOT, Fault, Node, Rollout, RolloutKind, RolloutTree
from trace_async.types import Completion, HiddenState, Task


@dataclass(slots=True, eq=False)
class Branch:
    """A rollout under way. It is not part of the tree yet."""

    kind: RolloutKind
    anchor: int
    """The node of the tree that it starts after."""
    round: int = 0
    """The round of Stage 2 that bought it, as in `Rollout`."""
    turns: list[Node] = field(default_factory=list)
    """Its nodes so far, those of context included. Their `parent` and `rollout` are filled in when the branch enters
    the tree. Until then a node's `follows` is a depth, since it has no index that could be named."""
    prompt_states: dict[int, HiddenState] = field(default_factory=dict)
    """Index of a turn → the hidden state at the end of the prompt that the turn was generated for."""

    def append(self, completion: Completion, observation: Sequence[int], seconds: float = 0.0) -> None:
        """Add a turn: what the policy wrote, the tokens of the answer that it got, and how long both took."""
        if completion.prompt_state is not None:
            self.prompt_states[len(self.turns)] = completion.prompt_state
        self.turns.append(
            Node(
                parent=-1,
                rollout=-1,
                token_ids=(*completion.token_ids, *observation),
                num_generated=len(completion.token_ids),
                logprobs=completion.logprobs,
                version_spans=completion.version_spans,
                prompt_tokens=completion.prompt_tokens,
                cached_tokens=completion.cached_tokens,
                seconds=seconds,
            )
        )

    def append_context(self, follows: int, token_ids: Sequence[int]) -> None:
        """Let the next turn go on from `token_ids`, after the tokens of the node at depth `follows` (-1: no node)."""
        self.turns.append(Node(parent=-1, rollout=-1, token_ids=tuple(token_ids), num_generated=0, follows=follows))


def tokens_before(line: Sequence[Node], depth: int | None = None) -> list[int]:
    """Return the tokens that the policy saw up to the end of one node of `line`.

    `line` holds nodes by depth, the prompt first. `depth` chooses the node (None: the last one).
    """
    at = len(line) - 1 if depth is None else depth
    chain = []
    while at >= 0:
        chain.append(line[at])
        follows = line[at].follows
        at = at - 1 if follows is None else follows
    return [token for node in reversed(chain) for token in node.token_ids]


class TreeBuilder:
    """A tree under construction.

    `nodes`, `rollouts`, `children`, `depths` and `states` mean the same as in `RolloutTree`, as far as it has grown.
    """

    def __init__(self, task: Task, *, root_value: float | None = None) -> None:
        """`root_value`: the predictor's V of the prompt, if it was asked."""
        self.task = task
        self.nodes = [Node(parent=-1, rollout=-1, token_ids=(), num_generated=0, value=root_value)]
        self.rollouts: list[Rollout] = []
        self.children: list[list[int]] = [[]]
        self.states: dict[int, HiddenState] = {}
        self.depths = [0]

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        return self.nodes[ROOT].token_ids

    def set_prompt(self, token_ids: tuple[int, ...]) -> None:
        self.nodes[ROOT] = replace(self.nodes[ROOT], token_ids=token_ids)

    def set_value(self, node: int, value: float) -> None:
        self.nodes[node] = replace(self.nodes[node], value=value)

    def history(self, branch: Branch) -> list[int]:
        """Return all tokens that the policy saw up to the end of the branch's last turn."""
        return tokens_before(self.line(branch))

    def line(self, branch: Branch) -> list[Node]:
        """Return all nodes from the prompt to the end of the branch, by depth. `follows` is a depth in all of them."""
        above = [self.nodes[index] for index in self.path(branch.anchor)]
        placed = [
            replace(node, follows=self.depths[node.follows]) if node.follows is not None and node.follows >= 0 else node
            for node in above
        ]
        return [*placed, *branch.turns]

    def add(self, branch: Branch, reward: float, metrics: Mapping[str, float]) -> range:
        """Make a finished branch part of the tree. Returns the indices of its nodes."""
        assert branch.turns, "a rollout has at least one turn"
        first, parent = len(self.nodes), branch.anchor
        for number, turn in enumerate(branch.turns):
            follows = turn.follows
            if follows is not None and follows >= 0:
                follows = self.path(parent)[follows]  # from a depth to an index
            self.nodes.append(replace(turn, parent=parent, rollout=len(self.rollouts), follows=follows))
            before = self.nodes[-1].before
            if number in branch.prompt_states and before >= 0:
                # Only the first state of a node is kept: a continuation finds its anchor's history in the cache, so
                # its state would be read from the single token that was not cached.
                self.states.setdefault(before, branch.prompt_states[number])
            self.children[parent].append(len(self.nodes) - 1)
            self.children.append([])
            self.depths.append(self.depths[parent] + 1)
            parent = len(self.nodes) - 1
        self.rollouts.append(
            Rollout(
                kind=branch.kind,
                anchor=branch.anchor,
                leaf=parent,
                reward=reward,
                metrics=metrics,
                round=branch.round,
            )
        )
        return range(first, len(self.nodes))

    def path(self, node: int) -> list[int]:
        """Return the node indices from the prompt to `node`, both included."""
        path = [node]
        while path[-1] != ROOT:
            path.append(self.nodes[path[-1]].parent)
        return path[::-1]

    def token_path(self, node: int) -> list[int]:
        """Return the nodes whose tokens the policy saw up to the end of `node`, in order."""
        path = [node]
        while (before := self.nodes[path[-1]].before) >= 0:
            path.append(before)
        return path[::-1]

    def fresh_nodes(self, rollout: int) -> list[int]:
        """Return the nodes that `rollout` itself wrote, in order of turns."""
        return [index for index in self.path(self.rollouts[rollout].leaf) if self.nodes[index].rollout == rollout]

    def tree(
        self,
        *,
        policy_version: int = 0,
        num_roots: int = 0,
        num_continuations: int = 0,
        failures: Mapping[str, int] | None = None,
        faults: Mapping[str, Fault] | None = None,
    ) -> RolloutTree:
        """Return the finished tree of all that was added, with rollouts in the order in which they ended."""
        return RolloutTree(
            task=self.task,
            nodes=tuple(self.nodes),
            rollouts=tuple(self.rollouts),
            policy_version_started=policy_version,
            num_roots_allocated=num_roots,
            num_continuations_allocated=num_continuations,
            failures=dict(failures or {}),
            faults=dict(faults or {}),
            states=dict(self.states),
        )
