"""Generated worlds, their questions and demonstrations, and the environment's turns."""

import asyncio
import pickle
from collections import Counter
from random import Random
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.multihop.demonstrations import ErrorRates
from envs.multihop.domain import DEFAULT_MIX, MultiHop, MultiHopEnv, QaSettings
from envs.multihop.retrieval import BM25Retriever, Passage
from envs.multihop.world import CHAIN_KINDS, KINDS, RELATIONS, World
from trace_async.env import DemonstrationSource, Demonstrator, EnvError
from trace_async.types import Message, Prompt, StepResult, Task

EQUAL_MIX = dict.fromkeys(KINDS, 1.0)
PASSAGES = [Passage("quiet river", "film director ada cohen year 1990"), Passage("ada cohen", "person mentor ben ito")]
TASK = Task(id="t", domain="multihop", kind="k", data={"question": "what is it ?", "answers": ["ben ito", "ito"]})


def make_env(**settings: int | str) -> MultiHopEnv:
    return MultiHopEnv(TASK, BM25Retriever(PASSAGES), QaSettings(**settings))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def domain() -> MultiHop:
    return MultiHop(num_train_worlds=30, num_heldout_worlds=20, mix=EQUAL_MIX)


@pytest.fixture(scope="module")
def default_tasks() -> dict[str, list[Task]]:
    domain = MultiHop()
    tasks = {"train": domain.tasks("train"), "heldout": domain.tasks("heldout"), "shown": domain.demonstration_tasks()}
    return {name: list(found) for name, found in tasks.items()}


async def play(domain: MultiHop, task: Task, turns: list[str]) -> StepResult:
    env = domain.make_env(task)
    await env.init()
    for turn in turns[:-1]:
        assert not (await env.step(turn)).done
    return await env.step(turns[-1])


async def test_turns_and_observations() -> None:
    env = make_env(max_turns=4)
    assert await env.init() == Prompt(messages=(Message(role="user", content="what is it ?"),))

    async def observe(turn: str) -> str:
        result = await env.step(turn)
        assert result.messages[0].role == "tool"
        return result.messages[0].content

    assert await observe("need director ; search [ quiet river ]") == "quiet river : film director ada cohen year 1990"
    assert await observe("search [ nowhere ]") == "nothing found"
    assert await observe("search [ ada cohen ]") == "ada cohen : person mentor ben ito ; last turn ; answer now"
    result = await env.step("found ben ito ; answer [ Ben Ito ]")
    assert result == StepResult(
        done=True,
        reward=1.0,
        metrics={"exact_match": 1.0, "f1": 1.0, "match": 1.0, "answered": 1.0, "malformed_turns": 0.0},
    )
    await env.close()
    await env.close()


async def test_in_the_last_turn_only_an_answer_counts() -> None:
    env = make_env(max_turns=1)
    result = await env.step("search [ quiet river ]")
    assert (result.done, result.reward, result.metrics["answered"]) == (True, 0.0, 0.0)
    assert (await make_env(max_turns=1).step("answer [ ito ]")).reward == 1.0


async def test_malformed_turns_are_explained_and_cost_a_turn() -> None:
    env = make_env(max_turns=3)
    how = "write search [ query ] or answer [ text ]"
    assert (await env.step("I wonder")).messages[0].content == f"error ; no action found ; {how}"
    cut = (await env.step("search [ x ]", truncated=True)).messages[0].content
    assert cut == f"error ; the turn was cut at its token limit before it ended ; {how} ; last turn ; answer now"
    result = await env.step("answer [")
    assert (result.reward, result.metrics["malformed_turns"]) == (0.0, 3.0)


async def test_reward_by_match_and_f1_as_metric() -> None:
    answer = "found ; answer [ ben cohen ]"  # F1 with "ben ito": 1/2
    strict = await make_env(reward="exact_match").step(answer)
    loose = await make_env(reward="match").step(answer)
    assert (strict.reward, loose.reward) == (0.0, 1.0)
    assert strict.metrics["f1"] == pytest.approx(0.5)


async def test_several_passages_and_the_limit_of_an_observation() -> None:
    content = (await make_env(top_k=2).step("search [ ada cohen ]")).messages[0].content
    assert content.split("\n") == [f"{p.title} : {p.text}" for p in reversed(PASSAGES)]
    cut = (await make_env(top_k=2, max_observation_chars=20).step("search [ ada cohen ]")).messages[0].content
    assert cut == "ada cohen : person m [ cut ]"


async def test_forks_are_independent() -> None:
    env = make_env(max_turns=3)
    await env.init()
    await env.step("bad")
    fork = await env.fork()
    assert "last turn" in (await env.step("search [ ada ]")).messages[0].content
    assert (await env.step("search [ ada ]")).reward == 0.0
    late_fork = await fork.fork()
    assert "last turn" in (await fork.step("search [ quiet ]")).messages[0].content
    assert (await fork.step("answer [ ito ]")).metrics["malformed_turns"] == 1.0
    assert "last turn" in (await late_fork.step("search [ quiet ]")).messages[0].content


async def test_a_broken_search_is_not_the_models_fault() -> None:
    class Broken:
        async def search(self, query: str, *, top_k: int) -> tuple[Passage, ...]:
            raise EnvError("server gone")

        async def close(self) -> None: ...

    with pytest.raises(EnvError, match="server gone"):
        await MultiHopEnv(TASK, Broken(), QaSettings()).step("search [ x ]")


@given(turns=st.lists(st.one_of(st.text(max_size=30), st.just("search [ ada ]")), min_size=5, max_size=5))
@settings(max_examples=50, deadline=None)
def test_no_turn_breaks_the_environment(turns: list[str]) -> None:
    async def run() -> StepResult:
        env = make_env(max_turns=5)
        for turn in turns:
            result = await env.step(turn)
            if result.done:
                break
        return result

    assert asyncio.run(run()).reward in (0.0, 1.0)


def test_a_world_follows_from_its_seed() -> None:
    one, same, other = World(3, 1), World(3, 1), World(3, 2)
    assert one.facts == same.facts
    assert one.facts != other.facts
    assert len(one.passages) == 60 + 50 + 16 + 16
    for entity, facts in one.facts.items():
        for relation, value in facts.items():
            target = RELATIONS[one.types[entity]][relation]
            assert target == "literal" or one.types[value] == target


def test_a_full_name_finds_its_document_and_half_a_name_a_distractor() -> None:
    world = World(0, 0)
    for entity in world.types:
        assert world.retriever.search_now(entity, top_k=1)[0].title == entity
    people = world.by_type["person"]
    found = [world.retriever.search_now(name.split()[0], top_k=1)[0].title == name for name in people]
    assert 0.1 < sum(found) / len(found) < 0.4


def test_answers_follow_from_the_facts(domain: MultiHop) -> None:
    for task in domain.tasks("train"):
        data: Any = task.data
        world = World(0, data["world"])
        entities, relations = data["entities"], data["relations"]
        ends = list(entities)
        for relation in relations:
            ends = [world.facts[end][relation] for end in ends]
        if task.kind == "middle-older":
            assert task.data["answers"] == [entities[ends.index(min(ends))]]
        elif task.kind == "middle-country":
            assert task.data["answers"] == ["yes" if ends[0] == ends[1] else "no"]
        else:
            assert len(relations) == CHAIN_KINDS[task.kind][0]
            assert task.data["answers"] == ends


def test_splits_share_neither_worlds_nor_questions(default_tasks: dict[str, list[Task]]) -> None:
    assert {name: len(tasks) for name, tasks in default_tasks.items()} == {
        "train": 10_000,
        "heldout": 2_000,
        "shown": 10_000,
    }
    texts = {name: {task.data["question"] for task in tasks} for name, tasks in default_tasks.items()}
    assert not texts["train"] & texts["heldout"]
    assert not texts["shown"] & texts["heldout"]
    worlds = {name: {task.data["world"] for task in tasks} for name, tasks in default_tasks.items()}
    assert (len(worlds["train"]), len(worlds["heldout"])) == (400, 200)
    assert not worlds["train"] & worlds["heldout"]
    assert len({task.id for tasks in default_tasks.values() for task in tasks}) == 22_000


def test_the_mix_of_kinds_is_as_asked(default_tasks: dict[str, list[Task]]) -> None:
    counts = Counter(task.kind for task in default_tasks["train"])
    assert set(counts) == set(DEFAULT_MIX)
    for kind, share in DEFAULT_MIX.items():
        assert counts[kind] / 10_000 == pytest.approx(share, abs=0.04)
    only = MultiHop(num_train_worlds=3, mix={"middle-2hop": 2.0, "easy-1hop": 0.0})
    assert {task.kind for task in only.tasks("train")} == {"middle-2hop"}


def test_tasks_are_stable_and_small_slices_span_many_worlds(domain: MultiHop) -> None:
    again = MultiHop(num_train_worlds=30, num_heldout_worlds=20, mix=EQUAL_MIX)
    tasks = domain.tasks("heldout")
    assert list(again.tasks("heldout")) == list(tasks)
    assert len({task.data["world"] for task in tasks[:20]}) == 20
    assert tasks[-1] == tasks[len(tasks) - 1]
    assert pickle.loads(pickle.dumps(tasks[7])) == tasks[7]
    with pytest.raises(IndexError):
        tasks[len(tasks)]


async def test_demonstrations_without_errors_succeed_wherever_the_turns_suffice() -> None:
    domain = MultiHop(num_train_worlds=20, mix=EQUAL_MIX, errors="none")
    assert isinstance(domain, Demonstrator)
    assert isinstance(domain, DemonstrationSource)
    for task in domain.tasks("train")[:300]:
        result = await play(domain, task, list(domain.demonstrate(task, Random(0))))
        assert result.metrics["malformed_turns"] == 0
        assert result.reward == float(not task.kind.startswith("hard")), task


@pytest.mark.parametrize("errors", ["systematic", "random"])
async def test_demonstrations_err_as_often_as_they_should(errors: str) -> None:
    domain = MultiHop(num_train_worlds=40, errors=errors)
    rewards: dict[str, list[float]] = {}
    for task in domain.tasks("train"):
        turns = list(domain.demonstrate(task, Random(task.id)))
        assert len(turns) <= 5
        result = await play(domain, task, turns)
        rewards.setdefault(task.kind.split("-")[0], []).append(result.reward or 0.0)
    share = {kind: sum(values) / len(values) for kind, values in rewards.items()}
    assert share["easy"] > 0.75
    assert 0.15 < share["middle"] < 0.75
    assert share["hard"] < 0.05


def test_half_names_are_searched_as_often_as_asked() -> None:
    domain = MultiHop(num_train_worlds=10, mix={"middle-1hop": 1.0}, errors={"half_name": 0.7})

    def asked_first(task: Task) -> Any:
        return cast(Any, task.data["entities"])[0]

    people = [
        task
        for task in domain.tasks("train")
        if World(0, cast(Any, task.data["world"])).types[asked_first(task)] == "person"
    ]
    half = [f"[ {asked_first(t).split()[0]} ]" in domain.demonstrate(t, Random(t.id))[0] for t in people]
    assert sum(half) / len(half) == pytest.approx(0.7, abs=0.15)


def test_the_vocabulary_covers_all_that_is_said(domain: MultiHop) -> None:
    words = set(domain.vocabulary())

    async def said(task: Task) -> list[str]:
        env = domain.make_env(task)
        texts = [message.content for message in (await env.init()).messages]
        for turn in ["what ?", "search [ x ]", *domain.demonstrate(task, Random(0))[-1:]]:
            texts += [turn, *(message.content for message in (await env.step(turn)).messages)]
        return texts

    for task in domain.tasks("train")[:100]:
        for turn in domain.demonstrate(task, Random(task.id)):
            assert set(turn.split()) <= words
        assert {word for text in asyncio.run(said(task)) for word in text.split()} - words <= {"x"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"mix": {"hard-9hop": 1.0}}, r"mix\.hard-9hop: no such kind of question; there are easy-1hop"),
        ({"mix": {"easy-1hop": -1.0}}, "mix.easy-1hop=-1.0: must be ≥ 0"),
        ({"mix": {"easy-1hop": 0.0}}, "give at least one kind a share"),
        ({"num_train_worlds": 0}, "must be ≥ 1"),
        ({"errors": "sloppy"}, "errors=sloppy: name one of systematic, random, none"),
        ({"errors": {"half_name": 2.0}}, "half_name=2.0: must be in"),
        ({"errors": {"half": 0.2}}, r"errors\.half: unknown; the rates are careful"),
        ({"max_turns": 0}, "max_turns=0: must be ≥ 1"),
        ({"reward": "f1"}, "reward=f1: exact_match or match"),
    ],
)
def test_bad_settings_are_named(args: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiHop(**args)


def test_more_questions_than_a_world_has_are_refused() -> None:
    domain = MultiHop(mix={"easy-1hop": 1.0}, heldout_questions_per_world=60)
    with pytest.raises(ValueError, match="heldout_questions_per_world=60: a world has not so many"):
        domain.tasks("heldout")[0]


def test_named_rates() -> None:
    assert ErrorRates.named({"half_name": 0.5}) == ErrorRates(half_name=0.5)
    assert ErrorRates.named("none") == ErrorRates()
