"""Scale a run from 1 to 4 generators and back on a Ray cluster of several nodes: does its throughput follow?

    python -m scripts.bench.chaos.elastic --updates 8

All nodes are on this machine, so four real engines would share its cores and show nothing. Each generator therefore
has a pace of its own, like one on its own GPU: it is the embedded engine, which takes `PLACES` requests at a time and
keeps each for `HOLD_S` seconds. Everything else is real. The exit status is 1 when a rollout was lost or a size was not
reached.
"""

import argparse
import asyncio
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scripts.bench.chaos.__main__ import SMALL
from scripts.start_policy import ensure_policy
from trace_async.config import load_config
from trace_async.engines.embedded.engine import TorchEngine
from trace_async.run.checkpoint import latest_checkpoint
from trace_async.run.scaling import kept_sizes, order
from trace_async.run.state import load_trainer
from trace_async.tracking.log import Point, read_metrics
from trace_async.types import Completion, SamplingParams

HOLD_S = 0.25
"""The least seconds of a request."""
PLACES = 4
"""Requests of one generator at a time: with HOLD_S, at most 16 requests a second."""
LIMIT_S = 300.0
"""For one phase, the start of nodes and generators included."""


class PacedEngine(TorchEngine):
    """The embedded engine, which answers at the pace of a machine of its own."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._places = asyncio.Semaphore(PLACES)

    async def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
        async with self._places:
            completion, _ = await asyncio.gather(super().generate(prompt_ids, params), asyncio.sleep(HOLD_S))
        return completion


class LostError(Exception):
    """The run ended, or did not do what was asked of it in time; the text says what."""


def updates(run_dir: Path) -> list[Point]:
    return [point for point in read_metrics(run_dir) if "time/step_s" in point.metrics]


def until(happened: Callable[[], bool], driver: subprocess.Popen[bytes], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not happened():
        if driver.poll() is not None:
            raise LostError(f"the run ended with {driver.returncode} before {what}")
        if time.monotonic() > deadline:
            raise LostError(f"{what}: not within {LIMIT_S:g} s")
        time.sleep(0.2)


def measure(run_dir: Path, driver: subprocess.Popen[bytes], size: int, count: int) -> str:
    """Wait for `size` generators, let one more update pass, and return a row about the `count` after it."""

    def reached() -> bool:
        return bool(points := updates(run_dir)) and points[-1].metrics["generators/ready"] == size

    asked = time.monotonic()
    until(reached, driver, f"{size} generators")
    waited_s, first = time.monotonic() - asked, len(updates(run_dir)) + 1
    until(lambda: len(updates(run_dir)) >= first + count, driver, f"{count} updates with {size} generators")
    window = updates(run_dir)[first : first + count]
    rollouts = sum(p.metrics["budget/roots"] + p.metrics["budget/continuations"] for p in window)
    seconds = sum(p.metrics["time/step_s"] for p in window)
    idle = sum(p.metrics["idle/generator_share"] for p in window) / count
    waits = sum(p.metrics["time/wait_for_trees_s"] for p in window) / seconds
    rate = rollouts / seconds
    return f"| {size} | {waited_s:.0f} | {rate:.2f} | {rate / size:.2f} | {idle:.0%} | {waits:.0%} |"


def play(run_dir: Path, driver: subprocess.Popen[bytes], sizes: Sequence[int], count: int) -> None:
    """Order one size after another, print what was measured at each, and stop the run."""
    print("| generators | seconds until they are ready | rollouts/s | a generator | idle | learner waits |")
    print("|---|---|---|---|---|---|", flush=True)
    until(lambda: bool(updates(run_dir)), driver, "the first update")
    for size in sizes:
        order(run_dir, size)  # the first order, too, switches off the rule that scales by itself
        print(measure(run_dir, driver, size, count), flush=True)
    driver.send_signal(signal.SIGTERM)
    driver.wait(LIMIT_S)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=8, help="measured at each size")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 4, 1])
    args = parser.parse_args()
    from ray.cluster_utils import Cluster

    policy = ensure_policy(load_config(None, SMALL))
    folder = Path(tempfile.mkdtemp(prefix="elastic-"))
    run_dir = folder / "elastic"
    # A node with a CPU for each generator; the learner and the predictor are on the head.
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    for _ in range(max(args.sizes)):
        cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    settings = [
        *SMALL,
        f"policy.path={policy}",
        f"actors.ray_address={cluster.address}",
        "engine.backend=scripts.bench.chaos.elastic:PacedEngine",
        f"actors.num_generators={args.sizes[0]}",
        f"actors.max_generators={max(args.sizes)}",
        "actors.generator_cpus=1",
        "budget.root_rollouts=32",
        "eval.every_updates=0",
        "checkpoint.every_updates=0",
        "num_updates=1000000",
        f"output_dir={folder}",
        f"tracking.uri=sqlite:///{folder}/mlflow.db",
        "name=elastic",
    ]
    with (folder / "terminal").open("wb") as terminal:
        driver = subprocess.Popen(
            [sys.executable, "-m", "scripts.cli", "train", *settings], stdout=terminal, stderr=subprocess.STDOUT
        )
        try:
            play(run_dir, driver, args.sizes, args.updates)
        except LostError as error:
            print(f"BROKEN {error}; the run said: {folder / 'terminal'}")
            return 1
        finally:
            driver.kill()
            cluster.shutdown()
    checkpoint = latest_checkpoint(run_dir / "checkpoints")
    assert checkpoint is not None, f"SIGTERM saves a checkpoint: {folder / 'terminal'}"
    ledger = load_trainer(checkpoint).state.ledger
    print(f"sizes {[size.num_generators for size in kept_sizes(run_dir)]}, failed rollouts {dict(ledger.failed)}")
    return int(sum(ledger.failed.values()) > 0)


if __name__ == "__main__":
    sys.exit(main())
