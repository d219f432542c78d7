"""LearnerGroup over real Ray actors and gloo: 1 and 2 ranks, resumed with other numbers of ranks, dying ranks."""

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import ray
import torch
from transformers import AutoModelForCausalLM

from actors.learner import LearnerGroup, LearnerRank, LearnerRankError
from tests.support.live_bytes import LiveBytes
from tests.unit.learner.test_learner import (
    VERSION,
    ZERO_3,
    assert_close,
    configure,
    learning,
    train,
    trees_of,
    weights_of,
)
from trace_async.engines.servers.server import free_port
from trace_async.learner.deepspeed import RankAddress, join_ranks
from trace_async.learner.learner import load_policy
from trace_async.learner.policy_tensors import full_bytes, policy_buckets
from trace_async.learner.state import load_learner, save_learner
from trace_async.run.checkpoint import CheckpointError, CheckpointStore, latest_checkpoint
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
        sizes = [(tmp_path / "learner" / f"tensors-000{rank}.safetensors").stat().st_size for rank in (0, 1)]
        assert max(sizes) < 1.1 * min(sizes)  # each rank wrote its half
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
    async with group_of(1, tiny_policy_path, "engine.weight_delta=true") as group:
        await group.weights(1)
        assert await group.delta() is None  # nothing was sent before
        metrics = await group.update(trees_of(0), VERSION)
        await group.weights(2)
        assert await group.delta() is None  # in float32 nearly every element changes
        await group.weights(3)
        same = await group.delta()
        assert same.base_version == 2
        assert (await same.delta).num_bytes == 0
        assert metrics["learner/loss"] == pytest.approx(reference[0][0]["loss"], abs=2e-5)
        with pytest.raises(AssertionError, match="staleness 3 is not within"):
            await group.update(trees_of(0), VERSION + 1)
        slow = LearnerGroup(configure("learner.step_timeout_s=0.001"), tiny_policy_path)
        slow._ranks = group._ranks
        with pytest.raises(LearnerRankError, match=r"learner ranks \[0\] did not finish update within"):
            await asyncio.wait_for(slow.update(trees_of(1, count=60), VERSION), 20)


@pytest.mark.timeout(600)
async def test_a_rank_without_work_keeps_in_step(tiny_policy_path):
    """One tree on two ranks: the second computes for nothing, under ZeRO-3 together with the first; so does the
    reference, which is partitioned too."""
    kl = "loss.kl_loss_coef=0.1"
    with learning(configure(kl), tiny_policy_path) as learner:
        wanted = [learner.update(trees_of(seed, count=1), VERSION) for seed in (5, 6)]
        weights = weights_of(learner)
    async with group_of(2, tiny_policy_path, kl, *ZERO_3) as group:
        for seed, one_rank in zip((5, 6), wanted, strict=True):
            metrics = await group.update(trees_of(seed, count=1), VERSION)
            for name in COMPARED:
                assert metrics[f"learner/{name}"] == pytest.approx(one_rank[name], rel=2e-4, abs=2e-5), name
        assert metrics["learner/kl_reference"] == pytest.approx(wanted[1]["kl_reference"], rel=1e-3)
        assert metrics["learner/kl_reference"] > 1e-6
        assert_close(await fetched(await group.weights(1)), weights, 1e-4)


@pytest.mark.timeout(600)
async def test_a_rank_that_cannot_write_or_dies_while_writing_costs_no_checkpoint(tiny_policy_path, tmp_path):
    store = CheckpointStore(tmp_path, 1)
    async with group_of(2, tiny_policy_path, "learner.zero_stage=3", "learner.step_timeout_s=120") as group:

        async def save(version: int, hinder: Callable[[Path], None] | None = None) -> None:
            async with store.saving(version) as folder:
                if hinder is not None:
                    hinder(folder / "tensors-0001.safetensors")  # rank 1's
                await group.save(folder)

        await save(1)
        with pytest.raises(
            CheckpointError, match=r"(?s)checkpoint 2 could not be saved.*tensors-0001.*000001, is whole"
        ):
            await save(2, Path.mkdir)
        # Rank 0 was not left waiting for rank 1 in the middle of gathering: both go on.
        await group.update(trees_of(0), VERSION)
        await save(3)
        assert latest_checkpoint(tmp_path) == tmp_path / "000003"
        # Rank 0 is in the middle of its save, for which it needs the other, until that one dies.
        rank_1 = await group._ranks[1].__ray_call__.remote(lambda _: os.getpid())
        os.kill(rank_1, signal.SIGSTOP)
        saving = asyncio.create_task(save(4))
        done, _ = await asyncio.wait([saving], timeout=1)
        assert not done
        assert list(tmp_path.glob(".saving-*"))
        os.kill(rank_1, signal.SIGKILL)
        with pytest.raises(LearnerRankError, match="learner rank 1 died during save"):
            await saving
        assert latest_checkpoint(tmp_path) == tmp_path / "000003"
        assert [entry.name for entry in tmp_path.iterdir()] == ["000003"]


def test_nobody_can_take_the_port_at_which_the_ranks_will_meet():
    rank_0 = LearnerRank(configure("learner.num_ranks=2"), "", 0)
    with pytest.raises(OSError, match="Address already in use"):
        socket.create_server(rank_0.meeting_point())


@ray.remote
def peak_of_loading(
    rank: int, port: int, policy_path: Path, overrides: Sequence[str]
) -> tuple[float, dict[str, torch.Tensor]]:
    """In two processes: the most bytes of tensors that live while the policy is loaded, in policies; and the policy."""
    config = configure("learner.num_ranks=2", *overrides)
    address = RankAddress(rank=rank, world_size=2, host="127.0.0.1", port=port)
    join_ranks(address, torch.device("cpu"), 60.0)
    with LiveBytes() as measured:
        policy = load_policy(config, policy_path)
    total = sum(full_bytes(parameter) for parameter in policy.parameters())
    (tensors,) = (
        {name: tensor.detach().clone() for name, tensor in bucket.items()} for bucket in policy_buckets(policy, 1 << 30)
    )
    return measured.peak / total, tensors


@pytest.mark.timeout(600)
async def test_zero_3_loads_no_whole_policy_on_any_rank(tiny_policy_path):
    port = free_port()
    ranks = await asyncio.gather(*(peak_of_loading.remote(rank, port, tiny_policy_path, ZERO_3) for rank in (0, 1)))
    wanted = dict(AutoModelForCausalLM.from_pretrained(tiny_policy_path).named_parameters())
    for _, tensors in ranks:
        assert_close(tensors, wanted, 0.0)
    first, second = (peak for peak, _ in ranks)
    assert 0.5 <= second < 0.8  # half of it, and one module at a time
    assert 0.5 <= first - 1 < 0.8  # rank 0 has the checkpoint's file mapped besides
