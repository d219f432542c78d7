"""Questions from files, and a scripted agent that finds HotpotQA's gold paragraphs with the real corpus."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from envs.multihop.qa_files import QaFiles, read_corpus
from tests.support.paths import SHARED_DATA

DATA = SHARED_DATA
needs_hotpotqa = pytest.mark.skipif(
    not (DATA / "hotpotqa_train.json").is_file(), reason=f"the HotpotQA sample is not in {DATA}"
)


def hotpot_row(number: int, **fields: object) -> dict[str, object]:
    row = {
        "_id": f"q{number}",
        "question": f"Who made thing {number}?",
        "answer": f"Maker {number}",
        "type": "bridge",
        "supporting_facts": [[f"Thing {number}", 0], [f"Thing {number}", 1]],
        "context": [[f"Thing {number}", ["A thing.", f" Made by Maker {number}."]], ["Other", ["Something else."]]],
    }
    return {**row, **fields}


def write(path: Path, rows: Sequence[Mapping[str, object]], *, lines: bool = False) -> str:
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    return str(path)


@needs_hotpotqa
async def test_searching_gold_titles_of_hotpotqa_finds_them_and_the_gold_answer_wins() -> None:
    domain = QaFiles(
        questions=str(DATA / "hotpotqa_train.json"), corpus=str(DATA / "hotpotqa_train_corpus.json"), top_k=3
    )
    tasks = [*domain.tasks("train"), *domain.tasks("heldout")]
    assert len(tasks) == 100
    found, rewards = [], []
    for task in tasks:
        env = domain.make_env(task)
        prompt = await env.init()
        assert prompt.messages[1].content == task.data["question"]
        for title in task.data["gold_titles"]:
            result = await env.step(f"I look for the page ; search [ {title} ]")
            found.append(f"{title} : " in result.messages[0].content)
        rewards.append((await env.step(f"answer [ {task.data['answers'][0]} ]")).reward)
        await env.close()
    assert rewards == [1.0] * 100
    assert len(found) == 200
    assert sum(found) >= 198  # two pages of one name, or a title of stop words only, may lose


@needs_hotpotqa
def test_hotpotqa_splits_are_disjoint_and_stable() -> None:
    one, two = (QaFiles(questions=str(DATA / "hotpotqa_train.json")) for _ in range(2))
    train, heldout = ({task.id for task in one.tasks(split)} for split in ("train", "heldout"))
    assert not train & heldout
    assert len(train | heldout) == 100
    assert 10 <= len(heldout) <= 30
    assert [task.id for task in two.tasks("heldout")] == [task.id for task in one.tasks("heldout")]


async def test_own_paragraphs_are_the_corpus_when_none_is_given(tmp_path: Path) -> None:
    path = write(tmp_path / "q.json", [hotpot_row(i) for i in range(20)])
    domain = QaFiles(questions=path, heldout_share=0.5, top_k=1)
    task = domain.tasks("train")[0]
    number = task.id[1:]
    assert task.data == {
        "question": f"Who made thing {number}?",
        "answers": [f"Maker {number}"],
        "gold_titles": [f"Thing {number}"],
    }
    env = domain.make_env(task)
    await env.init()
    result = await env.step(f"search [ maker {number} ]")
    assert result.messages[0].content == f"Thing {number} : A thing. Made by Maker {number}."


async def test_2wiki_aliases_count_as_answers(tmp_path: Path) -> None:
    rows = [hotpot_row(i, answer="United States", answer_id="Q30", type="inference") for i in range(2)]
    aliases = [{"Q_id": "Q30", "aliases": ["USA", "America"], "demonyms": ["American"]}]
    domain = QaFiles(
        questions=write(tmp_path / "train.json", rows[:1]),
        heldout=write(tmp_path / "dev.json", rows[1:]),
        aliases=write(tmp_path / "id_aliases.json", aliases, lines=True),
        format="2wiki",
    )
    (task,) = domain.tasks("heldout")
    assert (task.id, task.kind) == ("q1", "inference")
    assert task.data["answers"] == ["United States", "USA", "America", "American"]
    assert (await domain.make_env(task).step("answer [ the usa ]")).reward == 1.0
    assert (await domain.make_env(task).step("answer [ Canada ]")).reward == 0.0


async def test_musique(tmp_path: Path) -> None:
    def row(number: int, **fields: object) -> dict[str, object]:
        paragraphs = [
            {
                "idx": 0,
                "title": "Steve Hillage",
                "paragraph_text": "He married Miquette Giraudy.",
                "is_supporting": True,
            },
            {"idx": 1, "title": "Miami", "paragraph_text": "A city.", "is_supporting": False},
        ]
        return {
            "id": f"2hop__{number}_86706",
            "paragraphs": paragraphs,
            "question": f"Who is the spouse of number {number}?",
            "answer": "Miquette Giraudy",
            "answer_aliases": ["Giraudy"],
            **fields,
        }

    path = write(tmp_path / "m.jsonl", [*(row(i) for i in range(10)), row(10, answerable=False)], lines=True)
    domain = QaFiles(questions=path, format="musique", heldout_share=0.5, top_k=1)
    tasks = [*domain.tasks("train"), *domain.tasks("heldout")]
    assert len(tasks) == 10
    assert tasks[0].kind == "2hop"
    assert tasks[0].data["gold_titles"] == ["Steve Hillage"]
    env = domain.make_env(tasks[0])
    assert (await env.step("search [ Hillage ]")).messages[0].content.startswith("Steve Hillage : He married")
    assert (await env.step("answer [ giraudy ]")).reward == 1.0


def test_corpora_in_three_shapes(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"T": ["One.", " Two."]}')
    (tmp_path / "b.json").write_text('[{"title": "T", "text": "One. Two."}]')
    (tmp_path / "c.jsonl").write_text('{"title": "T", "text": ["One.", " Two."]}\n')
    shapes = [read_corpus(tmp_path / name) for name in ("a.json", "b.json", "c.jsonl")]
    assert [[(p.title, p.text) for p in shape] for shape in shapes] == [[("T", "One. Two.")]] * 3


def test_what_is_wrong_is_said_with_file_and_place(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.json: no such file"):
        QaFiles(questions=str(tmp_path / "none.json"))
    broken = hotpot_row(1)
    del broken["answer"]
    with pytest.raises(ValueError, match=r"q\.json, row 2: field 'answer' is missing"):
        QaFiles(questions=write(tmp_path / "q.json", [hotpot_row(0), broken]))
    with pytest.raises(ValueError, match=r"f\.json: question q0: expected a list of pairs, found \['Thing'\]"):
        QaFiles(questions=write(tmp_path / "f.json", [hotpot_row(0, supporting_facts=["Thing"])]))
    same = write(tmp_path / "same.json", [hotpot_row(0)])
    with pytest.raises(ValueError, match="1 questions are in both splits: Who made thing 0"):
        QaFiles(questions=same, heldout=same)
    with pytest.raises(ValueError, match="hotpotqa, 2wiki or musique"):
        QaFiles(questions=same, format="squad")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no heldout questions"):
        QaFiles(questions=same, heldout_share=0.0001)
