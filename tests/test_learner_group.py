"""LearnerGroup over real Ray actors and gloo: 1 and 2 ranks, resumed with other numbers of ranks, dying ranks."""

import asyncio
from collections.abc import Sequence
from contextlib import asynccontextmanager

import pytest
import ray
import torch

from actors.learner import LearnerGroup, LearnerRankError
from tests.test_learner import VERSION, assert_close, configure, learning, train, trees_of, weights_of
from trace_async.learner_state import load_learner, save_learner
from trace_async.weights import join_buckets, unpack_weights

COMPARED = ("loss", "grad_norm", "ratio_mean", "clip_fraction", "entropy", "mismatch", "mismatch_max", "trained_tokens")

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(scope="module")
def reference(tiny_policy_path):
    """Three updates of one rank at ZeRO 0, in this process."""
    return train(configure(), tiny_policy_path)


async def fetched(references: Sequence[ray.ObjectRef]) -> dict[str, torch.Tensor]:
    """The weights, as a generator sees them."""
    *buckets, manifest = await asyncio.gather(*references)
    return unpack_weights(join_buckets(buckets, manifest))


@asynccontextmanager
async def group_of(ranks: int, policy_path, *overrides: str):
    group = LearnerGroup(configure(f"learner.num_ranks={ranks}", *overrides), policy_path)
    try:
        await group.start()
        yield group
    finally:
        await group.close()


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("stage", "resumed_stage"), [(0, 3), (3, 0)])
async def test_two_ranks_train_like_one_and_one_rank_goes_on(
    reference, tiny_policy_path, tmp_path, stage, resumed_stage
):
    wanted, weights = reference
    async with group_of(
        2, tiny_policy_path, f"learner.zero_stage={stage}", "learner.weight_bucket_bytes=40000"
    ) as group:
        for seed in (0, 1):
            metrics = await group.update(trees_of(seed), VERSION)
            for name in COMPARED:
                assert metrics[f"learner/{name}"] == pytest.approx(wanted[seed][name], rel=2e-4, abs=2e-5), name
        await group.save(tmp_path / "learner")
        assert (await group.update(trees_of(2), VERSION))["learner/loss"] == pytest.approx(wanted[2]["loss"], abs=2e-5)
        references = await group.weights(7)
        assert len(references) > 4  # buckets of 40 kB at most, and their manifest
        assert all(isinstance(reference, ray.ObjectRef) for reference in references)
        assert (await references[-1]).policy_version == 7
        assert_close(await fetched(references), weights, 1e-4)
        await group.export(tmp_path / "export")
        assert (tmp_path / "export" / "model.safetensors").is_file()
    with learning(configure(f"learner.zero_stage={resumed_stage}"), tiny_policy_path) as learner:
        load_learner(learner, tmp_path / "learner")
        assert learner.update(trees_of(2), VERSION)["loss"] == pytest.approx(wanted[2]["loss"], abs=2e-5)
        assert_close(weights_of(learner), weights, 1e-4)


@pytest.mark.timeout(600)
async def test_two_ranks_go_on_from_one_and_a_dead_rank_is_named(reference, tiny_policy_path, tmp_path):
    with learning(configure("learner.zero_stage=1"), tiny_policy_path) as learner:
        for seed in (0, 1):
            learner.update(trees_of(seed), VERSION)
        save_learner(learner, tmp_path / "learner")
    async with group_of(2, tiny_policy_path, "learner.zero_stage=2", "learner.step_timeout_s=60") as group:
        await group.load(tmp_path / "learner")
        metrics = await group.update(trees_of(2), VERSION)
        assert metrics["learner/loss"] == pytest.approx(reference[0][2]["loss"], abs=2e-5)
        assert_close(await fetched(await group.weights(3)), reference[1], 1e-4)
        ray.kill(group._ranks[1])
        with pytest.raises(LearnerRankError, match="learner rank 1 died during update"):
            await group.update(trees_of(0), VERSION)


@pytest.mark.timeout(600)
async def test_one_rank_and_a_call_that_takes_too_long(reference, tiny_policy_path):
    async with group_of(1, tiny_policy_path) as group:
        metrics = await group.update(trees_of(0), VERSION)
        assert metrics["learner/loss"] == pytest.approx(reference[0][0]["loss"], abs=2e-5)
        with pytest.raises(AssertionError, match="staleness 3 is not within"):
            await group.update(trees_of(0), VERSION + 1)
        slow = LearnerGroup(configure("learner.step_timeout_s=0.001"), tiny_policy_path)
        slow._ranks = group._ranks
        with pytest.raises(LearnerRankError, match=r"learner ranks \[0\] did not finish update within"):
            await asyncio.wait_for(slow.update(trees_of(1, count=60), VERSION), 20)


@pytest.mark.timeout(600)
async def test_a_rank_without_work_keeps_in_step(tiny_policy_path):
    """One tree on two ranks: the second computes for nothing, under ZeRO-3 together with the first."""
    with learning(configure(), tiny_policy_path) as learner:
        wanted = learner.update(trees_of(5, count=1), VERSION)
        weights = weights_of(learner)
    async with group_of(2, tiny_policy_path, "learner.zero_stage=3") as group:
        metrics = await group.update(trees_of(5, count=1), VERSION)
        for name in COMPARED:
            assert metrics[f"learner/{name}"] == pytest.approx(wanted[name], rel=2e-4, abs=2e-5), name
        assert_close(await fetched(await group.weights(1)), weights, 1e-4)
