"""Rollout trees as one self-contained HTML page: a drawing of each tree, and below it every node with its text.

The page loads nothing and runs no script (its own content policy forbids both); text is escaped twice over, control
characters first and markup then.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from trace_async.tracking.progress import printable
from trace_async.trees.text import Decode, NodeView, facts, node_name, summary, view_nodes
from trace_async.trees.tree import ROOT, RolloutTree

COLUMN, ROW, RADIUS = 76, 30, 9

STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --dim: #667085; --line: #cfd5df; --page: #f6f7f9; --card: #fff;
  --yes: #0b7a55; --no: #b3261e; --edge: #98a2b3; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --dim: #98a2b3; --line: #3a4252; --page: #14171d;
  --card: #1d222b; --yes: #4cc38a; --no: #ff8078; --edge: #667085; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 24px; font: 14px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--page); }
main { max-width: 1100px; margin: 0 auto; }
h1 { font-size: 20px; margin: 0 0 4px; } h2 { font-size: 16px; margin: 28px 0 4px; overflow-wrap: anywhere; }
p { margin: 0 0 12px; color: var(--dim); }
.drawing { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 8px; }
svg text { font: 11px system-ui, sans-serif; fill: var(--ink); } svg a:hover circle { stroke-width: 3; }
ul { list-style: none; margin: 0; padding: 0; }
ul.fork { margin-left: 9px; padding-left: 18px; border-left: 2px solid var(--line); }
ul.fork > li + li { margin-top: 18px; }
.node { background: var(--card); border: 1px solid var(--line); border-radius: 8px; margin: 8px 0; padding: 8px 12px; }
.node:target { outline: 3px solid #f2b84b; }
.head { display: flex; flex-wrap: wrap; gap: 6px 12px; align-items: baseline; }
.head b { white-space: nowrap; } .fact { color: var(--dim); white-space: nowrap; }
.plus { color: var(--yes); } .minus { color: var(--no); }
.end { font-weight: 600; } .yes { color: var(--yes); } .no { color: var(--no); }
pre { margin: 6px 0 0; font: 12.5px/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
pre.seen { color: var(--dim); border-left: 3px solid var(--line); padding-left: 9px; }
summary { cursor: pointer; color: var(--dim); }
.legend { font-size: 12px; }
"""

LEGEND = (
    "Colour of a node: V(H), the predicted chance to succeed from there on, from orange (0) through pale (½) to blue "
    "(1), grey where it was not asked. Solid: root rollouts; dashed: continuations, which start from a frozen turn. "
    "Credit: advantage × weight, by which each generated token of the node is trained. ✓ and ✗: the verifier's word."
)


@dataclass(frozen=True, slots=True)
class TreeSection:
    """A tree to show, with a heading and the credit by node (None: not shown)."""

    title: str
    tree: RolloutTree
    credit: Sequence[float] | None = None


def trees_page(title: str, sections: Sequence[TreeSection], decode: Decode) -> str:
    """The HTML page of `sections`."""
    body = []
    for number, section in enumerate(sections):
        views = view_nodes(section.tree, decode, section.credit)
        anchor = f"t{number}n"
        body += [
            f"<h2>{_text(section.title)}</h2><p>{_text(summary(section.tree))}</p>",
            f'<div class="drawing">{_drawing(section.tree, views, anchor)}</div>',
            _outline(section.tree, views, anchor),
        ]
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{_text(title)}</title><style>{STYLE}</style></head><body><main>"
        f'<h1>{_text(title)}</h1><p class="legend">{_text(LEGEND)}</p>{"".join(body)}</main></body></html>\n'
    )


def _outline(tree: RolloutTree, views: Sequence[NodeView], anchor: str) -> str:
    """Every node as a card, indented only where rollouts part."""
    parts: list[str] = []
    stack: list[int | str] = [ROOT]
    while stack:
        entry = stack.pop()
        if isinstance(entry, str):
            parts.append(entry)
            continue
        parts.append(_card(views[entry], anchor))
        below = tree.children[entry]
        if len(below) > 1:
            stack.append("</ul>")
            stack += [piece for child in reversed(below) for piece in ("</li>", child, "<li>")]
            stack.append('<ul class="fork">')
        else:
            stack += below
    return "".join(parts)


def _card(view: NodeView, anchor: str) -> str:
    head = [f"<b>{_text(node_name(view))}</b>"]
    for fact in facts(view):
        sign = view.credit if view.credit and fact.startswith("credit") else 0.0
        colour = " plus" if sign > 0 else " minus" if sign < 0 else ""
        head.append(f'<span class="fact{colour}">{_text(fact)}</span>')
    if view.mean_logprob is not None:
        count = "1 token" if view.num_generated == 1 else f"{view.num_generated} tokens"
        head.append(f'<span class="fact">{count}, mean log p {view.mean_logprob:.2f}</span>')
    if view.versions:
        head.append(f'<span class="fact">policy version {", ".join(map(str, view.versions))}</span>')
    if view.cached_share is not None:
        head.append(f'<span class="fact">{view.cached_share:.0%} of prefill cached</span>')
    if view.reward is not None:
        won = view.reward > 0.5
        mark = "✓" if won else "✗"
        head.append(f'<span class="end {"yes" if won else "no"}">{mark} reward {view.reward:g}</span>')
    seen = _seen(view)
    said = f"<pre>{_text(view.generated)}</pre>" if view.generated.strip() else ""
    return f'<div class="node" id="{anchor}{view.index}"><div class="head">{"".join(head)}</div>{said}{seen}</div>'


def _seen(view: NodeView) -> str:
    text = view.observation.strip()
    if not text:
        return ""
    block = f'<pre class="seen">{_text(text)}</pre>'
    lines = text.count("\n") + 1
    return block if lines <= 8 else f"<details><summary>{lines} lines</summary>{block}</details>"


def _drawing(tree: RolloutTree, views: Sequence[NodeView], anchor: str) -> str:
    """The tree from left to right: depth by column, a row for each leaf."""
    row = _rows(tree)
    at = {view.index: (20 + view.turn * COLUMN, 20 + row[view.index] * ROW) for view in views}
    edges, nodes = [], []
    for view in views:
        x, y = at[view.index]
        if view.index != ROOT:
            px, py = at[view.parent]
            dash = ' stroke-dasharray="4 3"' if view.is_continuation else ""
            middle = (px + x) / 2
            path = f"M{px} {py:.0f}C{middle} {py:.0f} {middle} {y:.0f} {x} {y:.0f}"
            edges.append(f'<path d="{path}" fill="none" stroke="var(--edge)" stroke-width="1.5"{dash}/>')
        title = _text(" · ".join([node_name(view), *facts(view)]))
        circle = f'<circle cx="{x}" cy="{y:.0f}" r="{RADIUS}" fill="{_colour(view.value)}" stroke="var(--ink)"/>'
        nodes.append(f'<a href="#{anchor}{view.index}">{circle}<title>{title}</title></a>')
        if view.reward is not None:
            mark, colour = ("✓", "var(--yes)") if view.reward > 0.5 else ("✗", "var(--no)")
            label = f"{mark} rollout {view.rollout}" + (f" {view.credit:+.2f}" if view.credit is not None else "")
            nodes.append(
                f'<text x="{x + RADIUS + 5}" y="{y + 4:.0f}" style="fill:{colour};font-weight:600">{label}</text>'
            )
    width = 40 + max(tree.depths) * COLUMN + 120
    height = 40 + max(row.values()) * ROW
    return f'<svg width="{width}" height="{height:.0f}" role="img">{"".join(edges + nodes)}</svg>'


def _rows(tree: RolloutTree) -> dict[int, float]:
    """Row of each node: leaves one below the other in order of reading, others amid their children."""
    rows: dict[int, float] = {}
    order: list[int] = []
    stack = [ROOT]
    while stack:
        index = stack.pop()
        order.append(index)
        stack += reversed(tree.children[index])
    leaves = 0
    for index in order:
        if not tree.children[index]:
            rows[index] = float(leaves)
            leaves += 1
    for index in reversed(order):
        if tree.children[index]:
            below = [rows[child] for child in tree.children[index]]
            rows[index] = (below[0] + below[-1]) / 2
    return rows


def _colour(value: float | None) -> str:
    """Orange (0) through near-white (½) to blue (1): told apart with every kind of colour blindness."""
    if value is None:
        return "#b8bfca"
    low, middle, high = (224, 130, 20), (247, 244, 238), (33, 102, 172)
    share = min(1.0, max(0.0, value))
    start, end, part = (low, middle, share * 2) if share < 0.5 else (middle, high, share * 2 - 1)
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(start, end, strict=True))
    return f"#{red:02x}{green:02x}{blue:02x}"


def _text(text: str) -> str:
    return escape(printable(text))
