"""What the viewer's page is given of a tree, and that it can hold no markup."""

import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.shown_run import HOSTILE, ShownRun
from trace_async.tracking.log import Point
from trace_async.trees.page import embedded, viewer_page
from trace_async.trees.payload import (
    MAX_TEXT_CHARS,
    backed_up_values,
    curves_payload,
    decisions,
    token_pieces,
    tree_payload,
)
from trace_async.trees.tree import Node, Rollout, RolloutTree

CREDIT = (0.0, -0.5, -0.5, -0.5, 0.25, 0.25)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> ShownRun:
    return ShownRun(tmp_path_factory.mktemp("run"))


def payload(shown: ShownRun, tree: RolloutTree) -> dict:
    return tree_payload(tree, shown.tokenizer.decode, CREDIT, stage2="contrast")


def test_every_figure_of_a_turn_is_the_trees(shown: ShownRun) -> None:
    found = payload(shown, shown.tree())
    assert found["nodes"][4] == {
        "parent": 1,
        "rollout": 2,
        "turn": 2,
        "depth": 2,
        "context": False,
        "value": 0.875,
        "after": 1.0,
        "leaves": 1,
        "succeeded": 1,
        "credit": 0.25,
        "tokens": ["search", " bob"],
        "logprobs": [-0.5, -0.5],
        "versions": [[0, 7]],
        "seen": "found ada",
        "prompt_tokens": 10,
        "cached_tokens": 8,
        "reward": None,
        "why": "",
    }
    assert found["rollouts"][2] == {
        "kind": "continuation",
        "anchor": 1,
        "leaf": 5,
        "reward": 1.0,
        "round": 0,
        "metrics": {"f1": 0.75},
    }
    assert (found["both"], found["generated_tokens"], found["failures"]) == (True, 10, {"timeout": 2})


def test_a_value_after_is_the_mean_of_the_leaves_below(shown: ShownRun) -> None:
    # Leaves: 2 and 3 fail, 5 succeeds; under the prompt one of three, under turn 1 one of two.
    assert backed_up_values(shown.tree()) == [pytest.approx(1 / 3), 0.5, 0.0, 0.0, 1.0, 1.0]


def test_why_budget_was_spent_is_worked_out_from_what_the_rules_saw(shown: ShownRun) -> None:
    why = decisions(shown.tree(), "contrast")
    # 1 − .25² − .75² = .375; rollout 0 passed turn 1 and failed, so a continuation differs with V = .625.
    assert why == {
        0: "Stage 1 gave 2 root rollouts: with V = 0.25 both outcomes were expected among them with probability 0.38.",
        1: "Stage 2 (contrast) bought 1 continuation here: the rollout that passed ended with 0 and V is 0.62, so one "
        # Turn 4 lies on a success with V = .875: differing .125, so turn 1 is the first of the two.
        "continuation ends differently with probability 0.62, one of 1 with 0.62; number 1 of 2 turns by that measure.",
    }


def test_tokens_add_up_to_the_text_also_where_a_character_takes_several(shown: ShownRun) -> None:
    ids = shown.ids("search ada, then <b>bob</b>")
    pieces = token_pieces(ids, shown.tokenizer.decode)
    assert "".join(pieces) == "search ada, then <b>bob</b>"
    assert len(pieces) == len(ids)

    def decode_bytes(token_ids: Sequence[int]) -> str:
        return bytes(token_ids).decode("utf-8", errors="replace")

    assert token_pieces(list("a✓b".encode()), decode_bytes) == ["a", "", "", "✓", "b"]
    assert token_pieces([97, 0xE2, 0x9C], decode_bytes) == ["a", "", "\ufffd"]  # cut in the middle of a character


def test_a_long_observation_is_cut_and_says_so(shown: ShownRun) -> None:
    tree = shown.tree()
    long = shown.ids("it " * 7000)
    nodes = (Node(parent=-1, rollout=-1, token_ids=long, num_generated=0), *tree.nodes[1:])
    seen = payload(shown, RolloutTree(task=tree.task, nodes=nodes, rollouts=tree.rollouts))["nodes"][0]["seen"]
    assert seen == ("it " * 7000)[:MAX_TEXT_CHARS] + "\n… 1000 more characters"


def test_curves_leave_out_what_is_not_finite() -> None:
    points = [Point(1, 0.0, {"a": 1.0, "b": float("nan")}), Point(2, 1.0, {"a": 2.5}), Point(2, 2.0, {"b": 3.0})]
    assert curves_payload(points) == {"a": [[1, 2], [1.0, 2.5]], "b": [[2], [3.0]]}


class Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)


def elements(page: str) -> Elements:
    found = Elements()
    found.feed(page)
    return found


@given(st.one_of(st.text(max_size=40), st.sampled_from([HOSTILE, "<!--<script>", "]]>", "{{script}}", "&lt;"])))
@settings(deadline=None, max_examples=60)
def test_no_text_adds_an_element_to_the_page_or_changes_the_data(text: str) -> None:
    data: dict[str, Any] = {"run": {"name": text}, text: [text]}
    page = elements(viewer_page(text, data))
    assert page.tags == elements(viewer_page("t", {"run": {}})).tags
    assert not re.search("[<>&]|[^\x00-\x7f]", embedded(data))
    assert json.loads(embedded(data)) == data


def test_the_page_loads_nothing_and_allows_only_its_own_script() -> None:
    page = viewer_page("Run", {"run": {}})
    assert not re.search(r"https?://|url\(|@import|innerHTML|insertAdjacentHTML|document\.write|eval\(", page)
    assert not set(elements(page).tags) & {"link", "img", "iframe", "object", "base"}
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    for part in ("default-src &#x27;none&#x27;", "connect-src &#x27;none&#x27;", "require-trusted-types-for"):
        assert part in policy[1]
    assert "unsafe" not in policy[1]
    assert "connect-src &#x27;self&#x27;" in viewer_page("Run", None)


def test_the_pages_files_are_installed_with_the_package(tmp_path: Path) -> None:
    page = viewer_page("Run", {"run": {}})
    assert "function drawNode(" in page
    assert "{{" not in page.replace("${{", "")


def test_another_conversation_of_a_rollout_stands_in_a_column_of_its_own(shown: ShownRun) -> None:
    context = Node(parent=1, rollout=0, token_ids=shown.ids("it"), num_generated=0, follows=-1)
    tree = RolloutTree(
        task=shown.tree().task,
        nodes=(
            Node(parent=-1, rollout=-1, token_ids=shown.ids("who"), num_generated=0),
            shown.turn(0, 0, "search ada"),
            context,
            shown.turn(2, 0, "answer ada"),
        ),
        rollouts=(Rollout(kind="root", anchor=0, leaf=3, reward=1.0),),
    )
    found = tree_payload(tree, shown.tokenizer.decode, (0.0,) * 4, stage2="none")["nodes"]
    assert [(node["turn"], node["depth"], node["context"]) for node in found] == [  # type: ignore[call-overload]
        *((0, 0, False), (1, 1, False), (1, 2, True), (2, 3, False))
    ]
