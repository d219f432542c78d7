"""Multi-hop questions from files: HotpotQA, 2WikiMultihopQA and MuSiQue, in the formats that their authors publish."""

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Literal

from envs.multihop.domain import MultiHopEnv, QaSettings
from envs.multihop.retrieval import BM25Retriever, HttpRetriever, Passage, Retriever
from trace_async.run.dataset import read_json, read_rows
from trace_async.types import Json, Split, Task

Format = Literal["hotpotqa", "2wiki", "musique"]
Retrieval = Literal["bm25", "dense", "hybrid"]

INSTRUCTIONS = """\
Answer the question with the help of a search tool. Think step by step. End every turn with exactly one action, either
search [ query ] to look up one thing, or answer [ text ] with the final answer in as few words as possible.
Example of a turn: I need to know who directed Jaws ; search [ Jaws director ]"""


class QaFiles:
    """Questions of a JSON or JSONL file, searched in `corpus`, on a server, or in the questions' own paragraphs.

    `format`: hotpotqa (also used for 2WikiMultihopQA's questions), 2wiki (with `aliases`, its id_aliases.json), or
    musique. `corpus`: a JSON object title → text or sentences, or rows with `title` and `text`; empty: all paragraphs
    that come with the questions. `retrieval`: bm25 (words), dense (meaning: nearest vectors of `embedding_model`, which
    is minilm or a sentence-transformers directory; `query_prefix` and `passage_prefix` as that model wants them) or
    hybrid (both, joined by rank). `retrieval_url`: a Search-R1-style server instead. `heldout`: a file of its own;
    empty: `heldout_share` of the questions, chosen by a hash of their ids.
    """

    name = "qa_files"

    def __init__(
        self,
        *,
        questions: str,
        format: Format = "hotpotqa",
        corpus: str = "",
        aliases: str = "",
        heldout: str = "",
        heldout_share: float = 0.2,
        retrieval: Retrieval = "bm25",
        embedding_model: str = "minilm",
        query_prefix: str = "",
        passage_prefix: str = "",
        retrieval_url: str = "",
        retrieval_timeout_s: float = 20.0,
        instructions: str = INSTRUCTIONS,
        max_turns: int = 4,
        top_k: int = 3,
        reward: Literal["exact_match", "match"] = "exact_match",
        max_observation_chars: int = 2000,
    ) -> None:
        if format not in ("hotpotqa", "2wiki", "musique"):
            raise ValueError(f"env.args.format={format}: hotpotqa, 2wiki or musique")
        if not 0 < heldout_share < 1:
            raise ValueError(f"env.args.heldout_share={heldout_share}: must be in (0, 1)")
        self._settings = QaSettings(
            max_turns=max_turns, top_k=top_k, reward=reward, max_observation_chars=max_observation_chars
        )
        self._instructions = instructions
        rows = _read_questions(questions, format)
        other_rows = _read_questions(heldout, format) if heldout else []
        known = read_aliases(aliases) if aliases else {}
        tasks = _make_tasks(questions, rows, format, known)
        if heldout:
            self._tasks = {"train": tasks, "heldout": _make_tasks(heldout, other_rows, format, known)}
        else:
            chosen = [_is_heldout(task.id, heldout_share) for task in tasks]
            self._tasks = {
                "train": [task for task, out in zip(tasks, chosen, strict=True) if not out],
                "heldout": [task for task, out in zip(tasks, chosen, strict=True) if out],
            }
        self._check_splits(questions)
        self._retriever: Retriever
        if retrieval_url:
            self._retriever = HttpRetriever(retrieval_url, timeout_s=retrieval_timeout_s)
        else:
            passages = read_corpus(corpus) if corpus else _own_paragraphs([*rows, *other_rows], format)
            self._retriever = make_retriever(
                passages,
                retrieval,
                embedding_model=embedding_model,
                query_prefix=query_prefix,
                passage_prefix=passage_prefix,
            )

    def tasks(self, split: Split) -> Sequence[Task]:
        return self._tasks[split]

    def make_env(self, task: Task) -> MultiHopEnv:
        return MultiHopEnv(task, self._retriever, self._settings, instructions=self._instructions)

    async def close(self) -> None:
        """End the connections to the retrieval server."""
        await self._retriever.close()

    def _check_splits(self, questions: str) -> None:
        texts = {split: {task.data["question"] for task in tasks} for split, tasks in self._tasks.items()}
        for split, found in texts.items():
            if not found:
                raise ValueError(f"env.args.questions={questions}: no {split} questions")
        both = texts["train"] & texts["heldout"]
        if both:
            raise ValueError(f"env.args.questions={questions}: {len(both)} questions are in both splits: {both.pop()}")


def make_retriever(
    passages: Sequence[Passage],
    retrieval: Retrieval,
    *,
    embedding_model: str = "minilm",
    query_prefix: str = "",
    passage_prefix: str = "",
) -> Retriever:
    """Return the retriever that `retrieval` names, over these passages. Raises ValueError for another name."""
    if retrieval == "bm25":
        return BM25Retriever(passages)
    if retrieval not in ("dense", "hybrid"):
        raise ValueError(f"env.args.retrieval={retrieval}: bm25, dense or hybrid")
    from envs.multihop.dense import DenseRetriever, HybridRetriever  # only here: it needs an optional package

    dense = DenseRetriever(passages, model=embedding_model, query_prefix=query_prefix, passage_prefix=passage_prefix)
    return dense if retrieval == "dense" else HybridRetriever(passages, dense)


def read_corpus(path: str | Path) -> list[Passage]:
    """Read passages: an object title → text or sentences, or rows (array, JSON lines) with `title` and `text`."""
    if not str(path).endswith(".jsonl"):
        document = read_json(path)
        if isinstance(document, dict):
            return [Passage(title, _joined(text)) for title, text in document.items()]
    rows = read_rows(path, {"title": str, "text": (str, list)})
    return [Passage(str(row["title"]), _joined(row["text"])) for row in rows]


def read_aliases(path: str | Path) -> dict[str, list[str]]:
    """2WikiMultihopQA's id_aliases.json: lines with `Q_id`, `aliases` and `demonyms`; entity id → other names."""
    rows = read_rows(path, {"Q_id": str, "aliases": list, "demonyms": list})
    return {str(row["Q_id"]): [*_texts(row["aliases"]), *_texts(row["demonyms"])] for row in rows}


def read_tasks(path: str, format: Format) -> list[Task]:
    """Return the questions of a file, as the domain reads them, without splits."""
    return _make_tasks(path, _read_questions(path, format), format, {})


def _read_questions(path: str, format: Format) -> list[dict[str, Json]]:
    if format == "musique":
        rows = read_rows(path, {"id": str, "question": str, "answer": str, "paragraphs": list})
        return [row for row in rows if row.get("answerable", True)]
    return read_rows(path, {"_id": str, "question": str, "answer": str, "context": list})


def _make_tasks(
    path: str, rows: Sequence[Mapping[str, Json]], format: Format, aliases: Mapping[str, list[str]]
) -> list[Task]:
    tasks = []
    for row in rows:
        try:
            tasks.append(_task(row, format, aliases))
        except ValueError as error:
            raise ValueError(f"{path}: question {row.get('id', row.get('_id'))}: {error}") from error
    return tasks


def _task(row: Mapping[str, Json], format: Format, aliases: Mapping[str, list[str]]) -> Task:
    if format == "musique":
        task_id = str(row["id"])
        kind = task_id.split("_")[0]  # "2hop__482757_12019", "4hop1__…"
        others = _texts(row.get("answer_aliases", []))
        gold = [_text(p, "title") for p in _objects(row["paragraphs"]) if p.get("is_supporting")]
    else:
        task_id = str(row["_id"])
        kind = str(row.get("type", format))
        others = aliases.get(str(row.get("answer_id", "")), [])
        gold = list(dict.fromkeys(str(fact[0]) for fact in _pairs(row.get("supporting_facts", []))))
    answers = list(dict.fromkeys([str(row["answer"]), *others]))
    data: dict[str, Json] = {"question": row["question"], "answers": list(answers), "gold_titles": list(gold)}
    return Task(id=task_id, domain="qa_files", kind=kind, data=data)


def _own_paragraphs(rows: Sequence[Mapping[str, Json]], format: Format) -> list[Passage]:
    passages: dict[Passage, None] = {}
    for row in rows:
        if format == "musique":
            found = [Passage(_text(p, "title"), _text(p, "paragraph_text")) for p in _objects(row["paragraphs"])]
        else:
            found = [Passage(str(title), _joined(text)) for title, text in _pairs(row["context"])]
        passages.update(dict.fromkeys(found))
    return list(passages)


def _is_heldout(task_id: str, share: float) -> bool:
    return int.from_bytes(blake2b(task_id.encode(), digest_size=4).digest(), "big") < share * 2**32


def _joined(text: Json) -> str:
    return text if isinstance(text, str) else "".join(_texts(text))


def _texts(values: Json) -> list[str]:
    if not isinstance(values, list):
        raise ValueError(f"expected a list, found {values!r}")
    return [str(value) for value in values]


def _objects(values: Json) -> list[dict[str, Json]]:
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise ValueError(f"expected a list of objects, found {str(values)[:80]}")
    return [value for value in values if isinstance(value, dict)]


def _pairs(values: Json) -> list[list[Json]]:
    if not isinstance(values, list) or not all(isinstance(value, list) and len(value) == 2 for value in values):
        raise ValueError(f"expected a list of pairs, found {str(values)[:80]}")
    return [value for value in values if isinstance(value, list)]


def _text(row: Mapping[str, Json], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise ValueError(f"field {name!r} must be text, found {value!r}")
    return value
