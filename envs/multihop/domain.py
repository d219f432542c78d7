"""Multi-hop questions answered with a search tool: the environment, and its domain of generated worlds.

A turn is one assistant message, `need director of quiet river ; search [ quiet river ]` or
`found ada cohen ; answer [ ada cohen ]`; the observation is a tool message with the passages found.
"""

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from random import Random
from typing import Literal

from envs.actions import REASONS, TRUNCATED, Malformed, cut_text
from envs.lazy_tasks import LazyTasks
from envs.multihop.demonstrations import ErrorRates, demonstrate
from envs.multihop.qa_metrics import AnswerScore, score_answer
from envs.multihop.retrieval import Retriever
from envs.multihop.world import KINDS, Question, World, vocabulary
from envs.react import UNCLOSED_BRACKET, parse_search_action
from trace_async.types import Json, Message, Prompt, Split, StepResult, Task

LAST_TURN = "last turn ; answer now"
NOTHING_FOUND = "nothing found"
HOW_TO_ACT = "write search [ query ] or answer [ text ]"

DEFAULT_MIX: Mapping[str, float] = {
    "easy-1hop": 0.40,
    "middle-2hop": 0.05,
    "middle-3hop": 0.09,
    "middle-4hop": 0.06,
    "hard-5hop": 0.20,
    "hard-6hop": 0.20,
}
"""Many questions that are easy, many out of reach (more hops than searches), a fifth to be learnt."""

_DEMONSTRATED_SHARES = {"easy": 0.2, "middle": 0.55, "hard": 0.25}
"""Of the demonstrations, by the first part of a kind's name: what is easy needs no more to be learnt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QaSettings:
    """What a question may cost, and what it pays."""

    max_turns: int = 5
    """Turns in all. In the last one only an answer counts."""
    top_k: int = 1
    """Passages of one search."""
    reward: Literal["exact_match", "match"] = "exact_match"
    """exact_match: the normalised answer is one of the right ones | match: token F1 ≥ 0.3 with one of them."""
    max_observation_chars: int = 2000
    """Longer observations are cut."""

    def __post_init__(self) -> None:
        for name in ("max_turns", "top_k", "max_observation_chars"):
            if getattr(self, name) < 1:
                raise ValueError(f"env.args.{name}={getattr(self, name)}: must be ≥ 1")
        if self.reward not in ("exact_match", "match"):
            raise ValueError(f"env.args.reward={self.reward}: exact_match or match")


class MultiHopEnv:
    """One question under way. `task.data`: `question`, and `answers` (the answer and its aliases)."""

    def __init__(self, task: Task, retriever: Retriever, settings: QaSettings, *, instructions: str = "") -> None:
        question, answers = task.data["question"], task.data["answers"]
        assert isinstance(question, str)
        assert isinstance(answers, list)
        self._question = question
        self._answers = [str(answer) for answer in answers]
        self._retriever = retriever
        self._settings = settings
        self._instructions = instructions
        self._turns = 0
        self._malformed = 0
        self._done = False

    async def init(self) -> Prompt:
        question = Message(role="user", content=self._question)
        if not self._instructions:
            return Prompt(messages=(question,))
        return Prompt(messages=(Message(role="system", content=self._instructions), question))

    async def step(self, action: str, *, truncated: bool = False) -> StepResult:
        assert not self._done, "step after the end"
        self._turns += 1
        is_last = self._turns == self._settings.max_turns
        parsed = Malformed(TRUNCATED) if truncated else parse_search_action(action)
        if isinstance(parsed, Malformed):
            self._malformed += 1
            return self._finish("") if is_last else self._observe(f"error ; {parsed.reason} ; {HOW_TO_ACT}")
        if parsed.name == "answer":
            return self._finish(parsed.text)
        if is_last:
            return self._finish("")
        passages = await self._retriever.search(parsed.text, top_k=self._settings.top_k)
        return self._observe("\n".join(f"{p.title} : {p.text}" for p in passages) or NOTHING_FOUND)

    async def fork(self) -> "MultiHopEnv":
        return copy.copy(self)

    async def close(self) -> None:
        return None

    def _observe(self, text: str) -> StepResult:
        text = cut_text(text, max_chars=self._settings.max_observation_chars)
        if self._turns == self._settings.max_turns - 1:
            text = f"{text} ; {LAST_TURN}"
        return StepResult(messages=(Message(role="tool", content=text),))

    def _finish(self, answer: str) -> StepResult:
        self._done = True
        score = score_answer(answer, self._answers) if answer else AnswerScore(0.0, 0.0, 0.0)
        metrics = {
            "exact_match": score.exact_match,
            "f1": score.f1,
            "match": score.match,
            "answered": float(bool(answer)),
            "malformed_turns": float(self._malformed),
        }
        return StepResult(done=True, reward=metrics[self._settings.reward], metrics=metrics)


class MultiHop:
    """Generated worlds, with demonstrations.

    `mix`: share of each kind of question (KINDS), in proportion; `errors` of the demonstrations: `systematic`,
    `random`, `none` or own rates (ErrorRates). Train and held-out worlds differ, and so do all texts of questions.
    Settings of the environment (QaSettings) are given beside them.
    """

    name = "multihop"
    in_random_order = True

    def __init__(
        self,
        *,
        seed: int = 0,
        num_train_worlds: int = 400,
        num_heldout_worlds: int = 200,
        train_questions_per_world: int = 25,
        heldout_questions_per_world: int = 10,
        mix: Mapping[str, float] = DEFAULT_MIX,
        errors: str | Mapping[str, float] = "systematic",
        max_turns: int = 5,
        reward: Literal["exact_match", "match"] = "exact_match",
    ) -> None:
        for kind, share in mix.items():
            if kind not in KINDS:
                raise ValueError(f"env.args.mix.{kind}: no such kind of question; there are {', '.join(KINDS)}")
            if share < 0:
                raise ValueError(f"env.args.mix.{kind}={share}: must be ≥ 0")
        if sum(mix.values()) <= 0:
            raise ValueError("env.args.mix: give at least one kind a share")
        if min(num_train_worlds, num_heldout_worlds, train_questions_per_world, heldout_questions_per_world) < 1:
            raise ValueError("env.args: numbers of worlds and of questions per world must be ≥ 1")
        self._seed = seed
        self._rates = ErrorRates.named(errors)
        self._settings = QaSettings(max_turns=max_turns, reward=reward)
        train, heldout = range(num_train_worlds), range(num_train_worlds, num_train_worlds + num_heldout_worlds)
        self._world = lru_cache(maxsize=1024)(partial(World, seed))
        self._train = self._world_tasks("train", "train", train, train_questions_per_world, mix)
        self._heldout = self._world_tasks("heldout", "heldout", heldout, heldout_questions_per_world, mix)
        self._shown = self._world_tasks("shown", "train", train, train_questions_per_world, _demonstrated_mix(mix))

    def tasks(self, split: Split) -> Sequence[Task]:
        return self._train if split == "train" else self._heldout

    def demonstration_tasks(self) -> Sequence[Task]:
        return self._shown

    def make_env(self, task: Task) -> MultiHopEnv:
        return MultiHopEnv(task, self._world_of(task).retriever, self._settings)

    def demonstrate(self, task: Task, rng: Random) -> Sequence[str]:
        question = Question(
            kind=task.kind,
            text=str(task.data["question"]),
            entities=_strings(task, "entities"),
            relations=_strings(task, "relations"),
            answer=_strings(task, "answers")[0],
        )
        return demonstrate(self._world_of(task), question, self._settings.max_turns, self._rates, rng)

    def vocabulary(self) -> Sequence[str]:
        grammar = f"need found search answer [ ] ; : error {LAST_TURN} {NOTHING_FOUND} {HOW_TO_ACT}".split()
        reasons = " ".join((*REASONS, UNCLOSED_BRACKET)).split()
        return list(dict.fromkeys([*grammar, *vocabulary(), *reasons]))

    def _world_of(self, task: Task) -> World:
        number = task.data["world"]
        assert isinstance(number, int)
        return self._world(number)

    def _world_tasks(
        self, name: str, split: Split, worlds: range, per_world: int, mix: Mapping[str, float]
    ) -> Sequence[Task]:
        """Return `per_world` questions of each world. Neighbours are of different worlds, so any slice is fair."""

        @lru_cache(maxsize=4096)
        def of_world(number: int) -> tuple[Task, ...]:
            questions = self._questions(number, split, per_world, mix)
            return tuple(self._task(f"{name}-{number}-{i}", number, question) for i, question in enumerate(questions))

        return LazyTasks(len(worlds) * per_world, lambda i: of_world(worlds[i % len(worlds)])[i // len(worlds)])

    def _questions(self, number: int, split: Split, count: int, mix: Mapping[str, float]) -> list[Question]:
        """Return the questions of one world, no text twice."""
        world = self._world(number)
        rng = Random(f"questions/{self._seed}/{number}")
        questions: dict[str, Question] = {}
        for _ in range(100 * count):
            kind = rng.choices(list(mix), list(mix.values()))[0]
            question = world.question(kind, rng, split)
            questions.setdefault(question.text, question)
            if len(questions) == count:
                return list(questions.values())
        raise ValueError(
            f"env.args.{split}_questions_per_world={count}: a world has not so many different questions of this mix"
        )

    def _task(self, task_id: str, number: int, question: Question) -> Task:
        data: dict[str, Json] = {
            "world": number,
            "question": question.text,
            "answers": [question.answer],
            "entities": list(question.entities),
            "relations": list(question.relations),
        }
        return Task(id=task_id, domain=self.name, kind=question.kind, data=data)


def _demonstrated_mix(mix: Mapping[str, float]) -> dict[str, float]:
    """Return `mix` with the groups of kinds brought to `_DEMONSTRATED_SHARES` of those that occur."""
    groups: dict[str, float] = defaultdict(float)
    for kind, share in mix.items():
        groups[kind.split("-")[0]] += share
    return {
        kind: _DEMONSTRATED_SHARES[kind.split("-")[0]] * share / groups[kind.split("-")[0]]
        for kind, share in mix.items()
        if share > 0
    }


def _strings(task: Task, field: str) -> tuple[str, ...]:
    values = task.data[field]
    assert isinstance(values, list)
    return tuple(str(value) for value in values)
