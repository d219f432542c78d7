"""Show one rollout tree as text in a terminal, and collect what both this text and the viewer's page show of a node.

For every node these are V(H) as the predictor saw it at the time of the allocation, how the leaves under the node
ended, the credit with which its generated tokens are trained, and what was said. All text is data: control characters,
terminal escapes and markup in it are shown, never obeyed.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich.text import Text

from trace_async.printable import one_line, printable
from trace_async.trees.tree import ROOT, RolloutTree

Decode = Callable[[Sequence[int]], str]

MAX_LINE_CHARS = 2_000
"""The most characters of one line, unless the whole text is asked for."""
MAX_FULL_LINE_CHARS = 1_000_000
"""The most characters of one line when the whole text is asked for. Longer lines break terminals, and nobody reads
them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeView:
    """What is shown of one node."""

    index: int
    parent: int
    turn: int
    """Turns of the policy up to and including this node; nodes of context do not count."""
    rollout: int
    value: float | None
    """V(H) at the time of the allocation (None: the predictor was not asked)."""
    num_leaves: int
    """Leaves under the node."""
    num_succeeded: int
    """How many of these leaves have a reward above one half."""
    credit: float | None
    """Advantage times weight (None: not computed, or nothing was generated)."""
    generated: str
    observation: str
    num_generated: int
    """Tokens that the policy generated."""
    mean_logprob: float | None
    """Mean log-probability of the generated tokens, in nats."""
    versions: tuple[int, ...]
    """The policy versions that wrote its tokens, ascending."""
    cached_share: float | None
    """Share of the prompt's tokens that came from the KV cache, in 0..1."""
    reward: float | None
    """The reward of the rollout that ends here (None: none does)."""
    is_continuation: bool
    is_context: bool
    """Whether it is a node of context, in which nothing is generated (see `Node.follows`)."""


def view_nodes(tree: RolloutTree, decode: Decode, credit: Sequence[float] | None = None) -> list[NodeView]:
    """Return all nodes in the tree's order. Raises ValueError unless `credit` has one number per node."""
    if credit is not None and len(credit) != len(tree.nodes):
        raise ValueError(f"{len(credit)} credits for {len(tree.nodes)} nodes")
    succeeded = _succeeded_under(tree)
    turns = _num_turns(tree)
    views = []
    for index, node in enumerate(tree.nodes):
        views.append(
            NodeView(
                index=index,
                parent=node.parent,
                turn=turns[index],
                is_context=node.follows is not None,
                rollout=node.rollout,
                value=node.value,
                num_leaves=tree.num_leaves[index],
                num_succeeded=succeeded[index],
                credit=credit[index] if credit is not None and node.num_generated else None,
                generated=decode(node.token_ids[: node.num_generated]),
                observation=decode(node.token_ids[node.num_generated :]),
                num_generated=node.num_generated,
                mean_logprob=sum(node.logprobs) / node.num_generated if node.num_generated else None,
                versions=tuple(sorted({span.policy_version for span in node.version_spans})),
                cached_share=node.cached_tokens / node.prompt_tokens if node.prompt_tokens else None,
                reward=tree.leaf_rewards.get(index),
                is_continuation=index != ROOT and tree.rollouts[node.rollout].kind == "continuation",
            )
        )
    return views


def _num_turns(tree: RolloutTree) -> list[int]:
    """Count, per node, the turns up to and including it. Nodes of context are not turns."""
    turns = [0]
    for node in tree.nodes[1:]:
        turns.append(turns[node.parent] + (node.follows is None))
    return turns


def _succeeded_under(tree: RolloutTree) -> list[int]:
    """Count, per node, the leaves under it whose reward is above one half."""
    counts = [int(tree.leaf_rewards.get(index, 0.0) > 0.5) for index in range(len(tree.nodes))]
    for index in range(len(tree.nodes) - 1, 0, -1):
        counts[tree.nodes[index].parent] += counts[index]
    return counts


def summary(tree: RolloutTree) -> str:
    """Describe the whole tree in one line, which is printable whatever its task is called."""
    num_roots = sum(rollout.kind == "root" for rollout in tree.rollouts)
    parts = [
        f"task {one_line(tree.task.id)} ({one_line(tree.task.domain)}, {one_line(tree.task.kind)})",
        f"{num_roots} root rollouts + {len(tree.rollouts) - num_roots} continuations",
        f"{_succeeded_under(tree)[ROOT]} of {len(tree.rollouts)} succeeded",
        f"{tree.num_generated_tokens} tokens generated",
    ]
    if tree.failures:
        parts.append("lost: " + ", ".join(f"{count} {one_line(kind)}" for kind, count in sorted(tree.failures.items())))
    return " · ".join(parts)


def tree_text(
    tree: RolloutTree, decode: Decode, credit: Sequence[float] | None = None, *, max_lines: int | None = 6
) -> Text:
    """Render the tree for a terminal; `.plain` of the result is without colour.

    A turn stands below the turn before it, and only a point where rollouts part adds an indentation. Each text is cut
    after `max_lines` lines (None: it is not cut).
    """
    views = view_nodes(tree, decode, credit)
    out = Text(printable(summary(tree)) + "\n", style="bold")
    for index, head, body in _walk(tree):
        view = views[index]
        out.append(head, style="dim")
        _append_head(out, view)
        bar = body + ("│ " if tree.children[index] else "  ")
        _append_block(out, bar, view.generated, "", max_lines)
        _append_block(out, bar + ("" if index == ROOT else "  "), view.observation, "dim", max_lines)
    return out


def _walk(tree: RolloutTree) -> Iterator[tuple[int, str, str]]:
    """Yield (node, what stands before its first line, what stands before its others) in order of reading."""
    # A stack of our own, because a rollout may have more turns than Python allows nested calls.
    stack = [(ROOT, "", "")]
    while stack:
        index, head, body = stack.pop()
        yield index, head, body
        below = tree.children[index]
        if len(below) == 1:
            stack.append((below[0], body, body))
            continue
        for child in reversed(below):
            last = child == below[-1]
            stack.append((child, body + ("└─" if last else "├─"), body + ("  " if last else "│ ")))


def node_name(view: NodeView) -> str:
    if view.index == ROOT:
        return "prompt"
    if view.is_context:
        return f"another conversation of rollout {view.rollout}"
    return f"turn {view.turn}, {'continuation' if view.is_continuation else 'rollout'} {view.rollout}"


def _append_head(out: Text, view: NodeView) -> None:
    out.append(f"● {node_name(view)}", style="bold").append("".join(f"  {fact}" for fact in facts(view)))
    if view.reward is not None:
        won = view.reward > 0.5
        out.append(f"  {'✓' if won else '✗'} reward {view.reward:g}", style="bold green" if won else "bold red")
    out.append("\n")


def facts(view: NodeView) -> list[str]:
    """List what is known of a node, in few words each."""
    known = [f"V {view.value:.2f}"] if view.value is not None else []
    if view.num_leaves > 1 or view.index == ROOT:
        known.append(f"{view.num_succeeded}/{view.num_leaves} succeed")
    if view.credit is not None:
        known.append(f"credit {view.credit:+.3f}")
    return known


def _append_block(out: Text, bars: str, text: str, style: str, max_lines: int | None) -> None:
    text = text.strip()
    lines = text.split("\n") if text else []
    # A line of ten megabytes is one line, so lines are cut too.
    max_chars = MAX_FULL_LINE_CHARS if max_lines is None else MAX_LINE_CHARS
    shown = lines if max_lines is None else lines[:max_lines]
    for line in shown:
        out.append(bars, style="dim").append(printable(line, max_chars) + "\n", style=style)
    if len(shown) < len(lines):
        out.append(bars, style="dim").append(f"… {len(lines) - len(shown)} more lines\n", style="dim italic")
