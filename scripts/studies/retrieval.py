"""How many of a question's gold passages are found when it is searched as it stands: BM25, dense, hybrid.

`python -m scripts.studies.retrieval QUESTIONS --corpus CORPUS`, files as of the `qa_files` domain. An agent may ask
better than the question; this is what it starts from. No bound on multi-hop success: a second hop's passage often
cannot be found before the first was read.
"""

import argparse
import asyncio
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from envs.multihop.qa_files import Format, Retrieval, make_retriever, read_corpus, read_tasks
from envs.multihop.retrieval import Passage
from trace_async.env import Task

HITS = (1, 3, 5, 10)


@dataclass(frozen=True, slots=True)
class Recall:
    """Over questions, at one number of passages."""

    share: float
    """Mean over questions of the share of their gold titles among the passages found."""
    error: float
    """Its standard error over questions; NaN for one question."""
    all_found: float
    """Share of the questions all of whose gold titles are found."""


def recall(found: Sequence[Sequence[str]], gold: Sequence[Sequence[str]], hits: int) -> Recall:
    """`found`: titles for every question, best first; `gold`: its gold titles, at least one. Of the first `hits`."""
    shares = [
        sum(title in titles[:hits] for title in wanted) / len(wanted)
        for titles, wanted in zip(found, gold, strict=True)
    ]
    error = statistics.stdev(shares) / math.sqrt(len(shares)) if len(shares) > 1 else math.nan
    return Recall(statistics.mean(shares), error, sum(share == 1 for share in shares) / len(shares))


async def study(tasks: Sequence[Task], passages: Sequence[Passage], retrieval: Retrieval, **model: str) -> str:
    """One line of the table: recall at HITS with standard errors, all gold found, milliseconds a query."""
    retriever = make_retriever(passages, retrieval, **model)
    questions = [str(task.data["question"]) for task in tasks]
    gold = [_gold(task) for task in tasks]
    begun = time.perf_counter()
    passages_found = [await retriever.search(text, top_k=max(HITS)) for text in questions]
    milliseconds = 1000 * (time.perf_counter() - begun) / len(tasks)
    await retriever.close()
    found = [[passage.title for passage in of_one] for of_one in passages_found]
    figures = [recall(found, gold, hits) for hits in HITS]
    cells = [f"{100 * f.share:.1f} ± {100 * f.error:.1f} ({100 * f.all_found:.0f})" for f in figures]
    return f"| {retrieval} | " + " | ".join(cells) + f" | {milliseconds:.1f} |"


def _gold(task: Task) -> list[str]:
    titles = task.data["gold_titles"]
    return [str(title) for title in titles] if isinstance(titles, list) else []


async def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("questions", help="a JSON or JSONL file of the qa_files domain")
    parser.add_argument("--corpus", required=True, help="title → text, or rows with title and text")
    parser.add_argument("--format", choices=get_args(Format), default="hotpotqa")
    parser.add_argument("--embedding-model", default="minilm", help="minilm or a sentence-transformers directory")
    args = parser.parse_args(arguments)
    tasks = [task for task in read_tasks(args.questions, args.format) if _gold(task)]
    passages = read_corpus(args.corpus)
    print(f"{len(tasks)} questions with gold passages, {len(passages)} passages; % of gold found (all of a question's)")
    print("| retrieval | " + " | ".join(f"first {hits}" for hits in HITS) + " | ms a query |")
    print("|---|" + "---|" * (len(HITS) + 1))
    for retrieval in get_args(Retrieval):
        model = {} if retrieval == "bm25" else {"embedding_model": args.embedding_model}
        print(await study(tasks, passages, retrieval, **model), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
