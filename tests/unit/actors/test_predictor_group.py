"""One predictor that learns and replicas that answer, in this process: real actors' code behind handles of asyncio."""

import asyncio
import inspect
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from actors.calls import CallTimeoutError
from actors.predictors.group import PredictorGroup
from actors.predictors.predictor import PredictorActor
from tests.unit.predictor.test_policy_trunk import ask, weights_of
from tests.unit.predictor.test_predictor import policy, world  # noqa: F401
from trace_async.config import Config, PredictorConfig
from trace_async.predictor.heads import Heads
from trace_async.types import HiddenState, PrefixQuery
from trace_async.weights import WeightUpdate

QUERIES = [
    PrefixQuery(token_ids=(22, 9, 5, sign), positions=(4,), turn_logprobs=((-1.0,),)) for sign in (30, 31, 30, 31, 30)
]


class Handle:
    """Stands for a Ray handle: `handle.method.remote(…)`; `restart` puts a new actor in its place, as Ray does."""

    def __init__(self, config: Config, path: Path, *, learns: bool) -> None:
        self.make = lambda: PredictorActor(config, str(path), learns=learns)
        self.actor = self.make()
        self.calls: list[str] = []

    def restart(self) -> None:
        self.actor = self.make()
        self.actor.current.clear()  # what its constructor does when Ray says that it was started anew

    def __getattr__(self, name: str) -> object:
        class Method:
            @staticmethod
            def remote(*arguments: object) -> asyncio.Future:
                self.calls.append(name)
                return asyncio.ensure_future(self._call(name, arguments))

        return Method

    async def _call(self, name: str, arguments: tuple) -> object:
        given = [await argument if inspect.isawaitable(argument) else argument for argument in arguments]
        return await getattr(self.actor, name)(*given)


@pytest.fixture(params=["policy", "own"])
def config(request: pytest.FixtureRequest) -> Config:
    return replace(Config(), predictor=PredictorConfig(trunk=request.param, num_layers=1, num_replicas=2))


@pytest.fixture
def group(config: Config, policy: Path) -> PredictorGroup:  # noqa: F811
    replicas = tuple(Handle(config, policy, learns=False) for _ in range(2))
    return PredictorGroup(Handle(config, policy, learns=True), replicas, start_limit_s=60, limit_s=60)


def values_of(handle: Handle) -> list[float]:
    return [float(value[0]) for value in handle.actor.predictor.predict(QUERIES)]


def state_of(group: PredictorGroup, query: PrefixQuery) -> HiddenState:
    """As the engine would give it."""
    return HiddenState(0, 10, group.actor.actor.predictor.trunk.read([query])[0].tobytes())


def lessons(group: PredictorGroup) -> list:
    return ask(group.actor.actor.predictor, world(np.random.default_rng(0), 40))


async def test_replicas_answer_with_what_the_learning_one_has_learnt(group: PredictorGroup):
    before = await group.answering.values(QUERIES)
    assert {float(value[0]) for value in before} == {0.5}
    metrics = await group.train(lessons(group), 0)
    assert metrics["predictor/brier"] > 0
    for replica in group.replicas:
        assert values_of(replica) == pytest.approx(values_of(group.actor), abs=1e-6)
    after = [float(value[0]) for value in await group.answering.values(QUERIES)]
    assert after == pytest.approx(values_of(group.actor), abs=1e-6)
    assert len({round(value, 6) for value in after}) == 2  # how questions are batched moves the last bit
    assert "values" not in group.actor.calls  # its time is for learning


async def test_what_was_learnt_goes_to_whoever_shares_it_also_after_a_checkpoint(
    config: Config,
    policy: Path,  # noqa: F811
    tmp_path: Path,
):
    got: list[WeightUpdate] = []

    async def share(learnt: asyncio.Future) -> None:
        got.append(await learnt)

    config = replace(config, predictor=replace(config.predictor, trunk="policy", num_replicas=0))
    group = PredictorGroup(Handle(config, policy, learns=True), (), start_limit_s=60, limit_s=60, share=share)
    await group.train(lessons(group), 0)
    given = [replace(query, states=(state_of(group, query),)) for query in QUERIES]
    values = [float(value[0]) for value in Heads.unpacked(got[0]).prefix_values(given)]
    assert values == pytest.approx(values_of(group.actor), abs=1e-6)
    await group.save(tmp_path / "predictor")
    await group.load(tmp_path / "predictor")
    assert Heads.unpacked(got[1]).prefix_values(given)[0].tolist() == [values[0]]


async def test_estimates_are_the_same_whoever_reads_them(group: PredictorGroup):
    await group.train(lessons(group), 0)
    ids = [str(number) for number in range(len(QUERIES))]
    shared = await group.estimate(ids, QUERIES)
    alone = await replace(group, replicas=()).estimate(ids, QUERIES)
    assert shared.a == pytest.approx(alone.a, abs=1e-5)
    assert shared.b == pytest.approx(alone.b, abs=1e-5)
    assert all("values" in replica.calls for replica in group.replicas)


async def test_a_replica_that_was_started_anew_answers_only_when_it_is_up_to_date(
    group: PredictorGroup,
    config: Config,
    policy: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("actors.predictors.group.WATCH_EVERY_S", 0.01)
    await group.train(lessons(group), 0)
    if config.predictor.trunk == "policy":
        (bucket,), manifest = weights_of(policy, scale=1.2, version=1)
        assert await group.receive_weights([bucket, manifest]) == 1
    expected = values_of(group.actor)
    group.replicas[0].restart()
    with pytest.raises(CallTimeoutError):
        await replace(group.answering, actors=group.replicas[:1], limit_s=0.1).values(QUERIES)
    watch = asyncio.create_task(group.watch())
    found = await replace(group.answering, actors=group.replicas[:1]).values(QUERIES)
    watch.cancel()
    assert [float(value[0]) for value in found] == pytest.approx(expected, abs=1e-6)
    assert group.num_caught_up == 1


async def test_the_learning_one_comes_back_with_the_newest_weights(
    config: Config,
    policy: Path,  # noqa: F811
    tmp_path: Path,
):
    config = replace(config, predictor=replace(config.predictor, trunk="policy", num_replicas=0))
    group = PredictorGroup(Handle(config, policy, learns=True), (), start_limit_s=60, limit_s=60)
    (bucket,), manifest = weights_of(policy, scale=1.2, version=1)
    await group.receive_weights([bucket, manifest])
    await group.train(lessons(group), 1)
    await group.save(tmp_path / "predictor")
    expected = values_of(group.actor)
    group.actor.restart()
    await group.load(tmp_path / "predictor")
    assert not await group.actor.is_current.remote()
    await group.receive_weights(group.weights)
    assert [float(value[0]) for value in await group.answering.values(QUERIES)] == pytest.approx(expected, abs=1e-6)


async def test_a_version_that_does_not_arrive_whole_is_no_version(group: PredictorGroup, config: Config, policy: Path):  # noqa: F811
    if config.predictor.trunk == "own":
        pytest.skip("takes no weights")
    (bucket,), manifest = weights_of(policy, scale=1.2, version=1)
    with pytest.raises(Exception, match="received"):
        await group.receive_weights([bucket, replace(manifest, checksum="0" * 32)])
    assert group.actor.actor.predictor.trunk.version == 0
