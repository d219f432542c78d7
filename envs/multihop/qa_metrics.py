"""Answers compared as in SQuAD and HotpotQA: normalised exact match and token F1."""

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

MATCH_F1 = 0.3
"""An answer with at least this token F1 counts as a match (the looser success of Tree-GRPO's and TRACE's QA tables)."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CLOSED_ANSWERS = {"yes", "no", "noanswer"}


@dataclass(frozen=True, slots=True)
class AnswerScore:
    """Each in [0, 1], the best over all accepted answers."""

    exact_match: float
    f1: float
    match: float


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous blanks (SQuAD's official script)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def token_f1(answer: str, gold: str) -> float:
    """Harmonic mean of token precision and recall; yes/no only count when equal (HotpotQA's official script)."""
    left, right = normalize_answer(answer), normalize_answer(gold)
    if left != right and (left in _CLOSED_ANSWERS or right in _CLOSED_ANSWERS):
        return 0.0
    left_tokens, right_tokens = left.split(), right.split()
    common = sum((Counter(left_tokens) & Counter(right_tokens)).values())
    if common == 0:
        return 0.0
    return 2 * common / (len(left_tokens) + len(right_tokens))


def score_answer(answer: str, golds: Sequence[str]) -> AnswerScore:
    """`golds`: the answer and its aliases. An answer that is empty once normalised never matches."""
    own = normalize_answer(answer)
    exact = float(bool(own) and any(own == normalize_answer(gold) for gold in golds))
    f1 = max((token_f1(answer, gold) for gold in golds), default=0.0)
    return AnswerScore(exact_match=exact, f1=f1, match=float(f1 >= MATCH_F1))
