"""Turn rollout trees into plain values for the viewer's page, with every text made printable.

The page only shows what is computed here. `page.py` embeds it so that no text can become markup or script.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

from trace_async.printable import printable
from trace_async.trees.text import Decode, summary, view_nodes
from trace_async.trees.tree import ROOT, Node, RolloutTree
from trace_async.types import Json, Point

MAX_TEXT_CHARS = 20_000
"""The most characters of one observation or prompt, so that the page of a whole run still opens. A longer text ends
with a note that says how much was left out."""


def tree_payload(tree: RolloutTree, decode: Decode, credit: Sequence[float], *, stage2: str) -> dict[str, Json]:
    """Return one tree as plain values.

    `credit` holds one number per node: the weight with which each of its generated tokens is trained. `stage2` is the
    name of the rule of Stage 2.
    """
    return {
        "task": printable(tree.task.id),
        "kind": printable(tree.task.kind),
        "domain": printable(tree.task.domain),
        "summary": printable(summary(tree)),
        "both": tree.has_both_outcomes,
        "version_started": tree.policy_version_started,
        "roots_allocated": tree.num_roots_allocated,
        "continuations_allocated": tree.num_continuations_allocated,
        "generated_tokens": tree.num_generated_tokens,
        "unique_tokens": tree.num_unique_tokens,
        "failures": {printable(kind): count for kind, count in tree.failures.items()},
        "faults": {
            printable(name): f"{fault.count} times, such as: {printable(fault.words)}"
            for name, fault in tree.faults.items()
        },
        "rollouts": [
            {
                "kind": rollout.kind,
                "anchor": rollout.anchor,
                "leaf": rollout.leaf,
                "reward": _rounded(rollout.reward),
                "round": rollout.round,
                "metrics": {printable(name): _rounded(value) for name, value in rollout.metrics.items()},
            }
            for rollout in tree.rollouts
        ],
        "nodes": _nodes(tree, decode, credit, stage2=stage2),
    }


def _nodes(tree: RolloutTree, decode: Decode, credit: Sequence[float], *, stage2: str) -> list[Json]:
    after = backed_up_values(tree)
    why = decisions(tree, stage2)
    return [
        {
            "parent": view.parent,
            "rollout": view.rollout,
            "turn": view.turn,
            "depth": tree.depths[view.index],
            "context": view.is_context,
            "value": _rounded(view.value),
            "after": _rounded(after[view.index]),
            "leaves": view.num_leaves,
            "succeeded": view.num_succeeded,
            "credit": _rounded(view.credit),
            "tokens": [printable(piece) for piece in token_pieces(_generated(node), decode)],
            "logprobs": [_rounded(value) for value in node.logprobs],
            "versions": [[span.start, span.policy_version] for span in node.version_spans],
            "seen": _text(view.observation),
            "prompt_tokens": node.prompt_tokens,
            "cached_tokens": node.cached_tokens,
            "reward": _rounded(view.reward),
            "why": why.get(view.index, ""),
        }
        for view, node in zip(view_nodes(tree, decode, credit), tree.nodes, strict=True)
    ]


def backed_up_values(tree: RolloutTree) -> list[float | None]:
    """Return, per node, the mean reward of the leaves under it (None if it has no leaf).

    This is V(H) as the rollouts measured it (METHOD section 2), to compare with what the predictor said.
    """
    total = [tree.leaf_rewards.get(index, 0.0) for index in range(len(tree.nodes))]
    for index in range(len(tree.nodes) - 1, 0, -1):
        total[tree.nodes[index].parent] += total[index]
    return [value / leaves if leaves else None for value, leaves in zip(total, tree.num_leaves, strict=True)]


def decisions(tree: RolloutTree, stage2: str) -> dict[int, str]:
    """Say in words, per node, why budget was spent there: what the rules saw and what they expected.

    Everything is computed from what the tree keeps: V at the time of the allocation, the outcome of the rollout that
    passed there, and the number of continuations bought.
    """
    words = {ROOT: _root_words(tree, stage2)}
    bought: dict[int, list[int]] = {}
    for index, rollout in enumerate(tree.rollouts):
        if rollout.kind == "continuation":
            bought.setdefault(rollout.anchor, []).append(index)
    ranking = sorted(
        (index for index in range(1, len(tree.nodes)) if tree.children[index] and tree.nodes[index].value is not None),
        key=lambda index: -_differing(tree, index),
    )
    place = {node: number for number, node in enumerate(ranking, 1)}
    for anchor, continuations in bought.items():
        words[anchor] = _anchor_words(tree, anchor, continuations, place, stage2)
    return words


def _root_words(tree: RolloutTree, stage2: str) -> str:
    value, m = tree.nodes[ROOT].value, tree.num_roots_allocated
    given = f"Stage 1 gave {m} root rollouts"
    further = sum(rollout.kind == "root" and not rollout.from_stage1 for rollout in tree.rollouts)
    more = f" As they agreed, Stage 2 ({stage2}) bought {further} further ones." if further else ""
    if value is None or m < 2:
        return f"{given}.{more}"
    contrast = 1 - value**m - (1 - value) ** m  # the m rollouts neither all succeed nor all fail
    chance = f"with V = {value:.2f} both outcomes were expected among them with probability {contrast:.2f}"
    return f"{given}: {chance}.{more}"


def _anchor_words(
    tree: RolloutTree, anchor: int, continuations: Sequence[int], place: Mapping[int, int], stage2: str
) -> str:
    k = len(continuations)
    rounds = sorted({tree.rollouts[index].round + 1 for index in continuations})
    said = f"Stage 2 ({stage2}) bought {k} continuation{'s' if k > 1 else ''} here"
    said += f" in round {', '.join(map(str, rounds))}" if rounds != [1] else ""
    value = tree.nodes[anchor].value
    if value is None:
        return f"{said}; V was not asked."
    passed = tree.rollouts[tree.nodes[anchor].rollout].reward
    differing = _differing(tree, anchor)
    said += (
        f": the rollout that passed ended with {passed:g} and V is {value:.2f}, so one continuation ends differently "
        f"with probability {differing:.2f}, one of {k} with {1 - (1 - differing) ** k:.2f}"
    )
    return f"{said}; number {place[anchor]} of {len(place)} turns by that measure."


def _differing(tree: RolloutTree, node: int) -> float:
    """Return the probability that a continuation from `node` ends unlike the rollout that passed there.

    With that rollout's reward r it is 1 − (rV + (1−r)(1−V)).
    """
    value, passed = tree.nodes[node].value, tree.rollouts[tree.nodes[node].rollout].reward
    assert value is not None
    return 1 - (passed * value + (1 - passed) * (1 - value))


def token_pieces(token_ids: Sequence[int], decode: Decode) -> list[str]:
    """Return the text that each token adds; joined, the pieces are the decoded text.

    A token's piece is "" if its character is completed by a later token. Every token is decoded together with the one
    before it, because tokenizers drop a blank at the start of a text.
    """
    pieces: list[str] = []
    start = end = 0  # tokens `start` to `end` are the context whose text is known
    for stop in range(1, len(token_ids) + 1):
        before, now = decode(token_ids[start:end]), decode(token_ids[start:stop])
        complete = now.startswith(before) and not now.endswith("\ufffd")  # the mark of half a character
        if complete or stop == len(token_ids):
            pieces.append(now[len(before) :])
            start, end = end, stop
        else:
            pieces.append("")
    return pieces


def curves_payload(points: Iterable[Point]) -> dict[str, Json]:
    """Return metric → [steps, values] in the order of logging. Values that are not finite are left out."""
    curves: dict[str, tuple[list[Json], list[Json]]] = {}
    for point in points:
        for name, value in point.metrics.items():
            if math.isfinite(value):
                steps, values = curves.setdefault(printable(name), ([], []))
                steps.append(point.step)
                values.append(_rounded(value))
    return {name: list(curve) for name, curve in curves.items()}


def _generated(node: Node) -> tuple[int, ...]:
    return node.token_ids[: node.num_generated]


def _text(text: str) -> str:
    cut = text[:MAX_TEXT_CHARS]
    left = len(text) - len(cut)
    return printable(cut) + (f"\n… {left} more characters" if left else "")


def _rounded(value: float | None) -> float | None:
    """Round to six significant figures, which is more than the page shows and halves its size."""
    return None if value is None else float(f"{value:.6g}")
