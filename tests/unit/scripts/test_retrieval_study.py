"""The study of recall, with shares worked out by hand and a corpus whose best passage is plain."""

import json
import math
from pathlib import Path

import pytest

from envs.multihop.qa_files import read_corpus, read_tasks
from scripts.studies.retrieval import recall, study


def test_recall_of_three_questions():
    found = [["a", "b", "c"], ["x", "a", "d"], ["y", "z", "w"]]
    gold = [["a", "c"], ["d"], ["a", "b", "c", "e"]]
    first = recall(found, gold, 1)  # shares 1/2, 0, 0
    assert first.share == pytest.approx(1 / 6)
    assert first.error == pytest.approx(1 / 6)  # variance (1/9 + 1/36 + 1/36) / 2 = 1/12, over 3, its root
    assert first.all_found == 0
    third = recall(found, gold, 3)  # shares 1, 1, 0
    assert (third.share, third.all_found) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert third.error == pytest.approx(1 / 3)
    assert math.isnan(recall(found[:1], gold[:1], 1).error)  # one question tells nothing of others


async def test_a_line_of_the_table(tmp_path: Path):
    corpus = {"Keld": ["Keld is a city in Arland."], "Ada": ["Ada wrote a song."], "Ben": ["Ben made a boat."]}
    ask = {"Which land is the city of Keld in?": "Keld", "Who wrote a song?": "Ada", "What is Orsen?": "Ben"}
    rows = [
        {"_id": f"q{n}", "question": text, "answer": "yes", "context": [], "supporting_facts": [[title, 0]]}
        for n, (text, title) in enumerate(ask.items())
    ]
    (tmp_path / "questions.json").write_text(json.dumps(rows))
    (tmp_path / "corpus.json").write_text(json.dumps(corpus))
    tasks = read_tasks(f"{tmp_path}/questions.json", "hotpotqa")
    line = await study(tasks, read_corpus(tmp_path / "corpus.json"), "bm25")
    assert line.startswith("| bm25 | 66.7 ± 33.3 (67) |")
