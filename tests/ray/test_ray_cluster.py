"""A Ray cluster of several nodes, all of them on this machine; what a run asks of it, and where things are placed."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util import placement_group_table

from actors.learner import LearnerGroup
from actors.ray_cluster import asked_of_ray, require_room
from scripts.bench.chaos.processes import role_of
from tests.ray.test_end_to_end import SMALL, command
from tests.support.paths import ROOT
from tests.unit.learner.test_learner import configure
from trace_async.config import ConfigError, load_config
from trace_async.engines.servers.server import free_port
from trace_async.run.checkpoint import latest_checkpoint
from trace_async.run.state import load_trainer
from trace_async.tracking.log import read_metrics
from trace_async.types import Point


@contextmanager
def cluster_of(*num_cpus: int) -> Iterator[Cluster]:
    """A node for each number of CPUs; the first is the head."""
    head, *others = num_cpus
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": head, "include_dashboard": False})
    try:
        for count in others:
            made.add_node(num_cpus=count)
        made.wait_for_nodes()
        yield made
    finally:
        made.shutdown()


JOIN = """
import sys, ray
from actors.ray_cluster import start_ray
from trace_async.config import ConfigError, load_config
try:
    start_ray(load_config(None, [f"actors.ray_address={sys.argv[1]}"]))
except ConfigError as error:
    sys.exit(str(error))
actor = ray.remote(num_cpus=0)(type("Actor", (), {"hello": lambda self: "hello"})).remote()
print("joined", ray.cluster_resources()["CPU"], ray.get(actor.hello.remote(), timeout=120))
"""


def join(address: str, home: Path) -> subprocess.CompletedProcess[str]:
    """A shell of its own, in which nobody has set how Ray asks for tokens."""
    shell = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"} | {"HOME": str(home)}
    command = [sys.executable, "-c", JOIN, address]
    return subprocess.run(command, cwd=ROOT, env=shell, capture_output=True, text=True, check=False, timeout=300)


@contextmanager
def head_at(address: str, home: Path, auth_mode: str) -> Iterator[subprocess.Popen[bytes]]:
    """A head in a process of its own, as from a shell; this process may have been told how to ask for tokens."""
    start = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=4"]
    start += [f"--port={address.rpartition(':')[2]}", "--include-dashboard=false", "--disable-usage-stats"]
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:  # sockets: short
        shell = os.environ | {"HOME": str(home), "RAY_AUTH_MODE": auth_mode}
        head = subprocess.Popen([*start, f"--temp-dir={folder}"], env=shell, stdout=subprocess.DEVNULL)
        try:
            yield head
        finally:
            head.terminate()
            head.wait()


def home_with_token(folder: Path, token: str) -> Path:
    (folder / ".ray").mkdir(parents=True)
    (folder / ".ray" / "auth_token").write_text(token)
    return folder


def join_once_up(head: subprocess.Popen[bytes], address: str, home: Path) -> subprocess.CompletedProcess[str]:
    joined = join(address, home)
    while "no Ray cluster answers there" in joined.stderr and head.poll() is None:
        time.sleep(1)
        joined = join(address, home)
    return joined


@pytest.mark.timeout(600)
def test_a_cluster_that_asks_for_a_token_is_joined_with_it_and_refuses_others_in_words(tmp_path: Path):
    """As `ray start --head` does once a local run has left a token in ~/.ray."""
    owner, other = home_with_token(tmp_path / "owner", 64 * "a"), home_with_token(tmp_path / "other", 64 * "b")
    address = f"127.0.0.1:{free_port()}"
    nobody = join(address, owner)
    assert nobody.returncode == 1
    assert f"actors.ray_address={address}: no Ray cluster answers there" in nobody.stderr
    with head_at(address, owner, "token") as head:
        joined = join_once_up(head, address, owner)
        assert "joined 4.0 hello" in joined.stdout, joined.stderr
        refused = join(address, other)
        assert refused.returncode == 1
        assert f"actors.ray_address={address}: " in refused.stderr
        assert "~/.ray/auth_token" in refused.stderr


@pytest.mark.timeout(600)
def test_a_cluster_without_tokens_is_joined_by_somebody_who_has_one(tmp_path: Path):
    """Shown one, it could not speak to the driver, and every actor would be called lost."""
    owner = home_with_token(tmp_path / "owner", 64 * "a")
    address = f"127.0.0.1:{free_port()}"
    with head_at(address, owner, "disabled") as head:
        joined = join_once_up(head, address, owner)
    assert "joined 4.0 hello" in joined.stdout, joined.stderr


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


@pytest.mark.timeout(600)
def test_ranks_share_as_few_nodes_as_hold_them(tiny_policy_path):
    with cluster_of(2, 2, 2) as cluster, ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        for num_ranks, num_nodes in ((2, 1), (3, 2)):
            nodes = pool.submit(nodes_of_ranks, cluster.address, tiny_policy_path, num_ranks).result()
            assert len(nodes) == num_ranks
            assert len(set(nodes)) == num_nodes


def train(*overrides: str) -> subprocess.Popen[str]:
    arguments = command("train", "--config", "configs/quickstart/multihop.yaml", *overrides)
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def hosts(node: Any, role: str) -> bool:
    """Whether one of the node's processes has this role."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return any(role_of(child) == role for child in raylet.children(recursive=True))


@pytest.mark.timeout(600)
def test_a_run_on_a_cluster_survives_the_loss_of_a_node(tmp_path):
    """Two ranks, two generators, the predictor, each on a node of its own; a generator's is killed, another comes."""
    small = ["budget.root_rollouts=8", "budget.pool_size=12", "eval.num_tasks=8", "policy.warm_start_steps=20"]
    spread = ["actors.num_generators=2", "actors.num_prompt_actors=2", "learner.num_ranks=2", "learner.zero_stage=3"]
    with cluster_of(1, 1, 1, 1, 1) as cluster:
        address = f"actors.ray_address={cluster.address}"
        too_much = train(address, *small, *spread, "learner.num_threads=7", f"output_dir={tmp_path}/too_much")
        run = train(
            *(address, *small, *spread, "num_updates=14"),
            *(
                f"output_dir={tmp_path}",
                f"policy.cache_dir={tmp_path}/policies",
                f"tracking.uri=sqlite:///{tmp_path}/ml",
            ),
        )
        metrics = tmp_path / "quickstart" / "metrics.jsonl"

        def num_updates() -> int:
            points = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
            return max([int(point["step"]) for point in points], default=0)

        while num_updates() < 3:
            assert run.poll() is None, run.stderr and run.stderr.read()
            time.sleep(0.5)
        victim = next(node for node in list(cluster.worker_nodes) if hosts(node, "generator"))
        cluster.remove_node(victim, allow_graceful=False)
        at_loss = num_updates()
        cluster.add_node(num_cpus=1)
        _, errors = run.communicate(timeout=400)
        assert run.returncode == 0, errors
        assert at_loss < num_updates() == 14
        assert (tmp_path / "quickstart" / "policy" / "model.safetensors").is_file()
        _, errors = too_much.communicate()
        assert too_much.returncode == 2
        assert f"the Ray cluster at {cluster.address} has 5 CPUs, and 17 are asked for: 2 by actors.num_gen" in errors


def node_with(cluster: Cluster, role: str) -> Any:
    return next((node for node in list(cluster.worker_nodes) if hosts(node, role)), None)


@pytest.mark.timeout(600)
def test_a_node_that_is_drained_under_load_is_left_and_no_rollout_is_lost(tiny_policy_path: Path, tmp_path: Path):
    """The generator's node is drained, as before a spot machine is taken away, and then goes."""
    settings = [*SMALL, "actors.generator_cpus=1", "actors.num_prompt_actors=2", "num_updates=500", "eval.num_tasks=8"]
    settings += [f"policy.path={tiny_policy_path}", f"output_dir={tmp_path}", "name=drained"]
    run_dir = tmp_path / "drained"
    # A CPU for each of learner, predictor and generator: whichever node the generator gets, it has it for itself.
    with cluster_of(0, 1, 1, 1) as cluster, (tmp_path / "terminal").open("w") as terminal:
        run = subprocess.Popen(
            command("train", f"actors.ray_address={cluster.address}", *settings),
            cwd=ROOT,
            stdout=terminal,
            stderr=subprocess.STDOUT,
        )

        def until(happened: Callable[[], object]) -> None:
            while not happened():
                assert run.poll() is None, (tmp_path / "terminal").read_text()
                time.sleep(0.5)

        def updates() -> list[Point]:
            return [point for point in read_metrics(run_dir) if "time/step_s" in point.metrics]

        until(lambda: len(updates()) >= 3)
        victim = node_with(cluster, "generator")
        assert victim is not None
        assert not hosts(victim, "learner")
        cluster.add_node(num_cpus=1)
        drain = [f"--address={cluster.address}", f"--node-id={victim.node_id}", "--reason-message=spot notice"]
        drain += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--deadline-remaining-seconds=3600"]
        ray_command = str(Path(sys.executable).with_name("ray"))
        drained = subprocess.run([ray_command, "drain-node", *drain], capture_output=True, text=True, check=False)
        assert drained.returncode == 0, drained.stderr
        until(lambda: not hosts(victim, "generator") and not hosts(victim, "prompts"))
        assert node_with(cluster, "generator") not in (None, victim)
        cluster.remove_node(victim, allow_graceful=True)
        seen = len(updates())
        until(lambda: len(updates()) >= seen + 3)
        run.send_signal(signal.SIGTERM)
        assert run.wait(timeout=200) == 130, (tmp_path / "terminal").read_text()
    last = updates()[-1].metrics
    assert last["generators/lost"] == 0
    assert last["budget/failed_rollouts"] == 0
    checkpoint = latest_checkpoint(run_dir / "checkpoints")
    assert checkpoint is not None
    saved = load_trainer(checkpoint)
    assert saved.state.ledger.failed == {}
    saved.check_ledger()
