"""A Ray cluster of several nodes, all of them on this machine; what a run asks of it, and where things are placed."""

import asyncio
import json
import multiprocessing
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util import placement_group_table

from actors.learner import LearnerGroup
from actors.ray_cluster import asked_of_ray, require_room
from tests.test_learner import configure
from trace_async.config import ConfigError, load_config

CPUS_PER_NODE = 2


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of three nodes with two CPUs each."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": CPUS_PER_NODE, "include_dashboard": False})
    for _ in range(2):
        made.add_node(num_cpus=CPUS_PER_NODE)
    made.wait_for_nodes()
    yield made.address
    made.shutdown()


def test_what_a_run_asks_for():
    overrides = ["actors.num_generators=3", "actors.generator_gpus=1", "actors.learner_gpus=1"]
    asked = asked_of_ray(load_config(None, [*overrides, "learner.num_ranks=4", "learner.num_threads=2"]))
    assert sum(asked["CPU"].values()) == 3 * 1 + 4 * 2 + 1
    assert sum(asked["GPU"].values()) == 3 + 4
    require_room(asked, {"CPU": 12, "GPU": 7}, "the cluster")
    with pytest.raises(ConfigError) as raised:
        require_room(asked, {"CPU": 64, "GPU": 6}, "the cluster")
    assert str(raised.value) == (
        "the cluster has 6 GPUs, and 7 are asked for: 3 by actors.num_generators × actors.generator_gpus, "
        "4 by learner.num_ranks × actors.learner_gpus"
    )
    only_generators = asked_of_ray(load_config(None, overrides), only_generators=True)
    assert {resource: sum(shares.values()) for resource, shares in only_generators.items()} == {"CPU": 3, "GPU": 3}


def nodes_of_ranks(address: str, policy_path: Path, num_ranks: int) -> list[str]:
    """Starts a learner, which takes part in its update, and tells on which node each rank was placed."""

    async def start() -> list[str]:
        group = LearnerGroup(configure(f"learner.num_ranks={num_ranks}"), policy_path)
        try:
            await group.start()
            assert group._placement is not None
            return list(placement_group_table(group._placement)["bundles_to_node_id"].values())
        finally:
            await group.close()

    ray.init(address=address, log_to_driver=False)
    try:
        return asyncio.run(start())
    finally:
        ray.shutdown()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("num_ranks", "num_nodes"), [(2, 1), (3, 2)])
def test_ranks_share_as_few_nodes_as_hold_them(cluster, tiny_policy_path, num_ranks, num_nodes):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        nodes = pool.submit(nodes_of_ranks, cluster, tiny_policy_path, num_ranks).result()
    assert len(nodes) == num_ranks
    assert len(set(nodes)) == num_nodes


def train(*overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "scripts.cli", "train", "--config", "configs/quickstart.yaml", *overrides]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.timeout(300)
def test_a_run_on_a_cluster(cluster, tmp_path):
    place = [f"actors.ray_address={cluster}", f"output_dir={tmp_path}", f"tracking.uri=sqlite:///{tmp_path}/ml.db"]
    small = ["budget.root_rollouts=8", "budget.pool_size=12", "eval.num_tasks=8", "policy.warm_start_steps=20"]
    spread = ["actors.num_generators=2", "actors.num_prompt_actors=2", "learner.num_ranks=2", "learner.zero_stage=3"]
    run = train(*place, *small, *spread, "num_updates=3", f"policy.cache_dir={tmp_path}/policies")
    assert run.returncode == 0, run.stderr
    metrics = [json.loads(line) for line in (tmp_path / "quickstart" / "metrics.jsonl").read_text().splitlines()]
    assert max(point["step"] for point in metrics) == 3
    assert (tmp_path / "quickstart" / "policy" / "model.safetensors").is_file()
    too_much = train(*place, *small, "learner.num_threads=7")
    assert too_much.returncode == 2
    assert f"the Ray cluster at {cluster} has 6 CPUs, and 9 are asked for: 1 by actors.num_gen" in too_much.stderr
