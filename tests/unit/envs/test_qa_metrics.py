"""Literal scores, worked by hand."""

import pytest

from envs.multihop.qa_metrics import AnswerScore, normalize_answer, score_answer, token_f1


def test_normalisation() -> None:
    assert normalize_answer("  The U.S.A.,\n a  big-country! ") == "usa bigcountry"
    assert normalize_answer("the a an .") == ""


@pytest.mark.parametrize(
    ("answer", "gold", "f1"),
    [
        ("ada cohen", "ada cohen", 1.0),
        ("ada", "ada cohen", 2 / 3),
        ("ada ada", "ada cohen", 0.5),
        ("the city of Paris", "paris", 0.5),  # {city, of, paris} against {paris}
        ("yes", "no", 0.0),
        ("yes it is", "yes", 0.0),
        ("Yes.", "yes", 1.0),
        ("x", "y", 0.0),
        ("", "y", 0.0),
    ],
)
def test_token_f1(answer: str, gold: str, f1: float) -> None:
    assert token_f1(answer, gold) == pytest.approx(f1)


def test_the_best_of_all_accepted_answers_counts() -> None:
    assert score_answer("USA", ["United States", "U.S.A."]) == AnswerScore(exact_match=1.0, f1=1.0, match=1.0)
    # 2 · 1 / (1 + 5) = 1/3 is a match, 2 · 1 / (1 + 6) = 0.286 is not
    assert score_answer("b", ["b c d e f"]).match == 1.0
    assert score_answer("b", ["b c d e f g"]).match == 0.0
    assert score_answer("b", ["b c d e f"]).exact_match == 0.0


def test_an_empty_answer_never_matches() -> None:
    assert score_answer("the", ["a"]) == AnswerScore(exact_match=0.0, f1=0.0, match=0.0)
