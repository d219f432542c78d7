"""A rollout tree while it grows: nodes are added in place, so the index of a node is what an anchor names.

        builder = TreeBuilder(task)           task's prompt is node 0
        branch = builder.branch("root", ROOT) a rollout under way; nobody else sees it
        branch.turns.append(...)
        builder.add(branch, reward, metrics)  its turns become nodes, and it a rollout
        builder.tree()                        the finished tree, checked

A rollout enters the tree only when its reward is known: one that broke down leaves nothing behind.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from trace_async.trees.tree import ROOT, Fault, Node, Rollout, RolloutKind, RolloutTree
from trace_async.types import Completion, HiddenState, Task


@dataclass(slots=True, eq=False)
class Branch:
    """A rollout under way below node `anchor` of a tree.

    `round`: the round of Stage 2 that bought it, as in `Rollout`. `turns`: its nodes so far, those of context included,
    whose `parent` and `rollout` are filled in when the branch enters the tree; until then `follows` is a depth.
    """

    kind: RolloutKind
    anchor: int
    round: int = 0
    turns: list[Node] = field(default_factory=list)
    prompt_states: dict[int, HiddenState] = field(default_factory=dict)

    def append(self, completion: Completion, observation: Sequence[int]) -> None:
        """One more turn: what the policy wrote, then what it was answered."""
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
            )
        )

    def append_context(self, follows: int, token_ids: Sequence[int]) -> None:
        """What the next turn goes on from: these tokens, behind those of the node at depth `follows` (-1: of none)."""
        self.turns.append(Node(parent=-1, rollout=-1, token_ids=tuple(token_ids), num_generated=0, follows=follows))


def tokens_before(line: Sequence[Node], depth: int | None = None) -> list[int]:
    """The tokens that the policy saw up to the end of the node at `depth` (None: the last) of a line by depth."""
    at = len(line) - 1 if depth is None else depth
    chain = []
    while at >= 0:
        chain.append(line[at])
        follows = line[at].follows
        at = at - 1 if follows is None else follows
    return [token for node in reversed(chain) for token in node.token_ids]


class TreeBuilder:
    """`nodes`, `rollouts`, `children` and `depths` are those of a `RolloutTree`, as far as it has grown.

    `states`: node → the policy's hidden state at the end of its history, as read for the turn after it.
    """

    def __init__(self, task: Task, *, root_value: float | None = None) -> None:
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
        """All tokens that the policy saw up to the end of the branch's last turn."""
        return tokens_before(self.line(branch))

    def line(self, branch: Branch) -> list[Node]:
        """All nodes from the prompt to the end of the branch, by depth; `follows` is a depth in all of them."""
        above = [self.nodes[index] for index in self.path(branch.anchor)]
        placed = [
            replace(node, follows=self.depths[node.follows]) if node.follows is not None and node.follows >= 0 else node
            for node in above
        ]
        return [*placed, *branch.turns]

    def add(self, branch: Branch, reward: float, metrics: Mapping[str, float]) -> range:
        """Enter a finished branch; returns the indices of its nodes."""
        assert branch.turns, "a rollout has at least one turn"
        first, parent = len(self.nodes), branch.anchor
        for number, turn in enumerate(branch.turns):
            follows = turn.follows
            if follows is not None and follows >= 0:
                follows = self.path(parent)[follows]
            self.nodes.append(replace(turn, parent=parent, rollout=len(self.rollouts), follows=follows))
            before = self.nodes[-1].before
            if number in branch.prompt_states and before >= 0:
                # What a continuation says of its anchor was read from the one token that was not cached.
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
        """Node indices from the prompt to `node`, both included."""
        path = [node]
        while path[-1] != ROOT:
            path.append(self.nodes[path[-1]].parent)
        return path[::-1]

    def token_path(self, node: int) -> list[int]:
        """The nodes whose tokens the policy saw up to the end of `node`, in order."""
        path = [node]
        while (before := self.nodes[path[-1]].before) >= 0:
            path.append(before)
        return path[::-1]

    def fresh_nodes(self, rollout: int) -> list[int]:
        """The nodes that `rollout` itself wrote, in order of turns."""
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
        """What has grown so far, rollouts in the order in which they ended."""
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
