"""The router: where a prompt begins, that it stays there, and where it goes when its generator breaks down."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
from ray.exceptions import ActorDiedError

from actors.generators.router import LOAD_BOUND, GeneratorRouter, RouterStats, loads_of_others
from trace_async.engine import EngineDeadError, EngineRequestError
from trace_async.types import Completion, SamplingParams, VersionSpan

PARAMS = SamplingParams()
ANSWER = Completion(
    token_ids=(1,),
    logprobs=(-1.0,),
    version_spans=(VersionSpan(0, 0),),
    finish_reason="stop",
    prompt_tokens=1,
    cached_tokens=0,
)


class Handle:
    """Looks like an actor handle whose `generate` does what `behave` does."""

    def __init__(self, behave: Callable[[], Awaitable[Completion]]) -> None:
        self.calls = 0
        self.generate = self
        self._behave = behave

    def remote(self, prompt_ids: tuple[int, ...], params: SamplingParams) -> Awaitable[Completion]:
        self.calls += 1
        return self._behave()


async def answers() -> Completion:
    return ANSWER


async def dies() -> Completion:
    raise ActorDiedError()


async def refuses() -> Completion:
    raise EngineRequestError("too long")


def router(**generators: Handle) -> GeneratorRouter:
    made = GeneratorRouter(wait_s=0.05, max_retries=2)
    made.announce(generators)
    return made


@contextmanager
def under_way(made: GeneratorRouter, key: str, rollouts: int) -> Iterator[None]:
    """A prompt with so many rollouts under way."""
    with ExitStack() as stack:
        stack.enter_context(made.hosting(key))
        for _ in range(rollouts):
            stack.enter_context(made.playing(key))
        yield


async def request(made: GeneratorRouter, key: str) -> Completion:
    with under_way(made, key, 1):
        return await made.generate(key, (1,), PARAMS)


def names(number: int) -> dict[str, Handle]:
    return {f"g{index}": Handle(answers) for index in range(number)}


def test_no_generator_takes_more_than_the_bound_while_prompts_are_small():
    made = router(**names(8))
    with ExitStack() as stack:
        for index in range(200):
            stack.enter_context(under_way(made, f"task {index}", 1))
            made.choose(f"task {index}")
        assert sum(made.loads.values()) == 200
        assert max(made.loads.values()) <= LOAD_BOUND * 200 / 8
    assert made.loads == {}


def test_the_load_of_others_counts_and_a_prompt_larger_than_the_bound_goes_where_least_is():
    made = router(**names(3))
    made.announce(made.generators, {"g0": 16, "g1": 8})
    for key in ("x", "y", "z"):
        with under_way(made, key, 8):
            assert made.choose(key) == "g2"  # (24 + 8) / 3 · 1.1 = 11.7: only there is room
    with under_way(made, "large", 100):
        assert made.choose("large") == "g2"


def test_a_prompt_stays_though_its_generator_becomes_the_most_loaded():
    made = router(**names(2))
    with under_way(made, "task", 4):
        home = made.choose("task")
        made.announce(made.generators, {home: 1000})
        assert made.choose("task") == home
        with under_way(made, "task", 4):  # the same task once more, of another pass over the data
            assert made.choose("task") == home
            assert made.loads == {home: 8}
        assert made.loads == {home: 4}
    with under_way(made, "task", 4):
        assert made.choose("task") != home


def test_a_prompt_between_two_stages_is_no_load_and_keeps_its_generator():
    made = router(**names(8))
    with made.hosting("task"):
        with made.playing("task"):
            home = made.choose("task")
            assert made.loads == {home: 1}
        assert made.loads == {}
        made.announce(made.generators, {home: 50})
        with made.playing("task"):
            assert made.choose("task") == home


def test_only_prompts_of_a_lost_generator_move_and_their_load_with_them():
    made = router(**names(3))
    keys = [f"task {index}" for index in range(60)]
    with ExitStack() as stack:
        for key in keys:
            stack.enter_context(under_way(made, key, 2))
        before = {key: made.choose(key) for key in keys}
        assert set(before.values()) == {"g0", "g1", "g2"}
        made.announce({name: handle for name, handle in made.generators.items() if name != "g2"})
        after = {key: made.choose(key) for key in keys}
        assert all(before[key] in ("g2", after[key]) for key in keys)
        assert made.num_moved == sum(home == "g2" for home in before.values())
        assert made.loads == Counter({home: 2 * n for home, n in Counter(after.values()).items()})


def test_routers_that_choose_at_the_same_time_do_not_all_choose_the_same_generator():
    many = names(16)
    chosen = Counter()
    for number in range(16):
        made = router(**many)
        made.announce(many, dict.fromkeys(many, 10))
        with under_way(made, f"task {number}", 1):
            chosen[made.choose(f"task {number}")] += 1
    assert max(chosen.values()) <= 4  # all 16, if each took the first of the least loaded


def test_every_router_hears_what_all_the_others_have():
    assert loads_of_others([{"a": 1, "b": 2}, {"b": 3}, {}]) == [{"a": 0, "b": 3}, {"a": 1, "b": 2}, {"a": 1, "b": 5}]


async def test_a_request_goes_elsewhere_when_its_generator_dies():
    dead, alive = Handle(dies), Handle(answers)
    made = router(dead=dead, alive=alive)
    for i in range(20):
        assert await request(made, f"task {i}") is ANSWER
    assert dead.calls == 1  # left out until the pool announces it anew
    assert alive.calls == 20
    assert made.stats() == RouterStats(num_moved=1, num_retried=1)
    assert made.loads == {}


async def test_a_wrong_request_is_not_retried():
    handle = Handle(refuses)
    with pytest.raises(EngineRequestError):
        await request(router(a=handle, b=handle), "t")
    assert handle.calls == 1


async def test_without_generators_a_request_waits_for_the_pool_and_not_for_ever():
    made = router()
    with pytest.raises(EngineDeadError, match=r"no generator came back within 0\.05 s"):
        await request(made, "t")

    made.wait_s = 5.0
    waiting = asyncio.create_task(request(made, "t"))
    await asyncio.sleep(0.01)
    made.announce({"new": Handle(answers)})
    assert await waiting is ANSWER


async def test_a_generator_that_died_is_left_out_even_when_the_pool_announces_it_before_it_knows():
    dead, alive = Handle(dies), Handle(answers)
    made = router(dead=dead)
    waiting = asyncio.create_task(request(made, "t"))
    made.wait_s = 5.0
    while not dead.calls:
        await asyncio.sleep(0)
    made.announce({"dead": dead})
    await asyncio.sleep(0)
    assert dead.calls == 1
    made.announce({"dead": dead, "alive": alive})
    assert await waiting is ANSWER


async def test_a_request_that_breaks_down_everywhere_says_so():
    made = router(a=Handle(dies), b=Handle(dies), c=Handle(dies))
    with pytest.raises(EngineDeadError, match="broke down 3 times"):
        await request(made, "t")
