"""The search agent's turn grammar: strict, and nothing makes it raise."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.actions import EMPTY, NO_BLOCK, TOO_LONG, TRAILING, TWO_BLOCKS, Malformed
from envs.react import UNCLOSED_BRACKET, SearchAction, parse_search_action


@pytest.mark.parametrize(
    ("turn", "action"),
    [
        ("need director of a b ; search [ a b ]", SearchAction("search", "a b")),
        ("answer[ yes ]", SearchAction("answer", "yes")),
        ("Thought\nwith lines.\nSEARCH [a  b]\n", SearchAction("search", "a b")),
        ("search [ f[0] and g[1] ]", SearchAction("search", "f[0] and g[1]")),
        ("research shows [ 1 ] ; answer [ x ]", SearchAction("answer", "x")),
        ("research [ x ]", Malformed(NO_BLOCK)),
        ("", Malformed(NO_BLOCK)),
        ("search for it", Malformed(NO_BLOCK)),
        ("search [ x", Malformed(UNCLOSED_BRACKET)),
        ("search [ x [ y ]", Malformed(UNCLOSED_BRACKET)),
        ("search [ x ] ; answer [ y ]", Malformed(TWO_BLOCKS)),
        ("answer [ x ] because", Malformed(TRAILING)),
        ("search [ \t ]", Malformed(EMPTY)),
        ("answer [ x ]" + " " * 100_000, Malformed(TOO_LONG)),
    ],
)
def test_turns(turn: str, action: SearchAction | Malformed) -> None:
    assert parse_search_action(turn) == action


@given(st.lists(st.one_of(st.sampled_from(["search", "answer", "[", "]", " ", "\x00"]), st.text(max_size=3))))
def test_any_text_gives_an_action_or_a_reason(fragments: list[str]) -> None:
    parsed = parse_search_action("".join(fragments))
    assert parsed.reason if isinstance(parsed, Malformed) else parsed.text.strip()


@given(st.text(alphabet="ab []", max_size=12), st.text(alphabet="xy ", max_size=5))
def test_balanced_text_comes_back(text: str, thought: str) -> None:
    depths = [text[: i + 1].count("[") - text[: i + 1].count("]") for i in range(len(text))]
    if text.strip() and min(depths) >= 0 and depths[-1] == 0:
        assert parse_search_action(f"{thought} ; answer [{text}]") == SearchAction("answer", " ".join(text.split()))
