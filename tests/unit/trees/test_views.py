from collections.abc import Sequence
from dataclasses import replace

import pytest

from trace_async.trees.text import summary, tree_text, view_nodes
from trace_async.trees.tree import Node, Rollout, RolloutTree
from trace_async.types import Task, VersionSpan

HOSTILE = (
    "</pre><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">\x1b]0;taken\x07\u202e"
)


class Words:
    """Token ids for whole texts, so that a test reads like the tree it shows."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, text: str) -> tuple[int, ...]:
        self.texts.append(text)
        return (len(self.texts) - 1,)

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(self.texts[token] for token in token_ids)


def turn(words: Words, parent: int, rollout: int, said: str, seen: str = "", value: float | None = None) -> Node:
    return Node(
        parent=parent,
        rollout=rollout,
        token_ids=words(said) + (words(seen) if seen else ()),
        num_generated=1,
        logprobs=(-0.5,),
        version_spans=(VersionSpan(0, 7),),
        value=value,
        prompt_tokens=10,
        cached_tokens=8,
    )


def make_tree(words: Words, said: str = "answer b") -> RolloutTree:
    """Root rollout 0 (turns 1, 2) fails; root rollout 1 (turn 3) fails; a continuation after turn 1 (4, 5) succeeds."""
    return RolloutTree(
        task=Task(id="q7", domain="multihop", kind="2-hop", data={}),
        nodes=(
            Node(parent=-1, rollout=-1, token_ids=words("who?"), num_generated=0, value=0.25),
            turn(words, 0, 0, "search a", "seen\na\nb", 0.5),
            turn(words, 1, 0, said),
            turn(words, 0, 1, "answer c"),
            turn(words, 1, 2, "search d", "found d", 0.875),
            turn(words, 4, 2, "answer d"),
        ),
        rollouts=(
            Rollout(kind="root", anchor=0, leaf=2, reward=0.0),
            Rollout(kind="root", anchor=0, leaf=3, reward=0.0),
            Rollout(kind="continuation", anchor=1, leaf=5, reward=1.0),
        ),
        failures={"timeout": 2},
    )


CREDIT = (0.0, 0.0, 0.0, 0.0, 0.5, 0.5)


def test_the_tree_as_text() -> None:
    words = Words()
    assert tree_text(make_tree(words), words.decode, CREDIT, max_lines=2).plain.splitlines() == [
        "task q7 (multihop, 2-hop) · 2 root rollouts + 1 continuations · 1 of 3 succeeded · 5 tokens generated"
        " · lost: 2 timeout",
        "● prompt  V 0.25  1/3 succeed",
        "│ who?",
        "├─● turn 1, rollout 0  V 0.50  1/2 succeed  credit +0.000",
        "│ │ search a",
        "│ │   seen",
        "│ │   a",
        "│ │   … 1 more lines",
        "│ ├─● turn 2, rollout 0  credit +0.000  ✗ reward 0",
        "│ │   answer b",
        "│ └─● turn 2, continuation 2  V 0.88  credit +0.500",
        "│   │ search d",
        "│   │   found d",
        "│   ● turn 3, continuation 2  credit +0.500  ✓ reward 1",
        "│     answer d",
        "└─● turn 1, rollout 1  credit +0.000  ✗ reward 0",
        "    answer c",
    ]


def test_what_is_known_of_a_node() -> None:
    words = Words()
    view = view_nodes(make_tree(words), words.decode)[4]
    assert (view.turn, view.value, view.num_leaves, view.num_succeeded) == (2, 0.875, 1, 1)
    assert (view.versions, view.cached_share, view.mean_logprob, view.credit) == ((7,), 0.8, -0.5, None)
    with pytest.raises(ValueError, match="2 credits for 6 nodes"):
        view_nodes(make_tree(words), words.decode, [1.0, 2.0])


def test_a_line_of_ten_megabytes_is_cut_and_says_so() -> None:
    words = Words()
    tree = make_tree(words, said="x" * 10_000_000)
    cut = tree_text(tree, words.decode).plain
    assert len(cut) < 10_000
    assert "9,998,000 more characters" in cut
    assert len(tree_text(tree, words.decode, max_lines=None).plain) < 1_100_000


@pytest.mark.parametrize("odd", ["a\x1b[2J\x07b", "a\u202eb", "a\ud800b", "a\nb", "x" * 10_000])
def test_a_task_is_named_in_one_printable_line_whatever_its_id_is(odd: str) -> None:
    words = Words()
    tree = make_tree(words)
    task = Task(id=odd, domain=odd, kind=odd, data={})
    line = summary(replace(tree, task=task, failures={odd: 1}))
    assert line.isprintable()
    assert len(line) < 1200
    assert line.encode()  # no lone surrogate is left
