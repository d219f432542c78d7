"""One way to call an actor: a result, or an error of a known type that names the actor."""

import asyncio
import pickle

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

from actors.calls import (
    ActorLostError,
    CallTimeoutError,
    NeededActorLostError,
    PromptLostError,
    ask,
    ask_all,
)
from trace_async.engine import EngineDeadError
from trace_async.types import LossKind


async def answers(value: object) -> object:
    return value


async def fails(error: BaseException) -> object:
    raise error


def raised_in_actor(error: Exception) -> Exception:
    """As Ray hands on what a method raised."""
    return RayTaskError("method", "the traceback", error).as_instanceof_cause()


async def test_an_answer_is_handed_on():
    assert await ask(answers(3), who="it", limit_s=1) == 3


@pytest.mark.parametrize("death", [ActorDiedError(), ActorUnavailableError("gone", b"0" * 16)])
async def test_a_dead_actor_is_named(death: Exception):
    with pytest.raises(ActorLostError, match=r"^generator-3 is lost: "):
        await ask(fails(death), who="generator-3", limit_s=1)


async def test_no_answer_in_time_is_named_with_the_limit_and_the_call_is_cancelled():
    cancelled = asyncio.Event()

    async def hangs() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    with pytest.raises(CallTimeoutError, match=r"^the predictor did not answer within 0.01 s"):
        await ask(hangs(), who="the predictor", limit_s=0.01)
    assert cancelled.is_set()


async def test_what_the_method_raised_is_raised_as_it_is_a_time_out_of_its_own_too():
    with pytest.raises(EngineDeadError, match="the traceback"):
        await ask(fails(raised_in_actor(EngineDeadError("gone"))), who="it", limit_s=1)
    with pytest.raises(TimeoutError, match="the traceback") as own:
        await ask(fails(raised_in_actor(TimeoutError("its own"))), who="it", limit_s=1)
    assert not isinstance(own.value, CallTimeoutError)


async def test_an_actor_that_lost_another_one_is_not_lost_itself():
    with pytest.raises(NeededActorLostError, match="PromptActor 0: the predictor is lost"):
        await ask(fails(raised_in_actor(ActorLostError("the predictor is lost"))), who="PromptActor 0", limit_s=1)
    assert not issubclass(NeededActorLostError, ActorLostError)


async def test_a_loss_keeps_its_kind_on_its_way_through_ray():
    lost = PromptLostError(LossKind.TREE_TIMEOUT)
    assert pickle.loads(pickle.dumps(lost)).kind is LossKind.TREE_TIMEOUT
    with pytest.raises(PromptLostError) as error:
        await ask(fails(raised_in_actor(lost)), who="PromptActor 0", limit_s=1)
    assert error.value.kind is LossKind.TREE_TIMEOUT


async def test_of_many_each_has_its_result_or_its_error():
    found = await ask_all([answers(1), fails(ActorDiedError()), answers(2)], who=["a", "b", "c"], limit_s=1)
    assert found[0] == 1
    assert isinstance(found[1], ActorLostError)
    assert found[2] == 2
