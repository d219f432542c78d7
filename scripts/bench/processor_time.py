"""Measure which part of a run uses the processor, start-up apart.

    python -m scripts.bench.processor_time --config configs/quickstart/multihop.yaml [section.name=value …]

Runs `train` as a child and reads, twice a second, the processor time of it and of every process it started. What is
reported lies between the first and the last update: start-up, the first evaluation and the last one are apart. A
process that ends between two looks loses at most what it used since the last one. Last comes how long the generator
and the learner had nothing to do.
"""

import argparse
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from trace_async.config import load_config
from trace_async.tracking.log import read_metrics
from trace_async.types import Point

EVERY_S = 0.5
_ACTOR = re.compile(r"ray::(\w+?)(\.|:|$)")


def part_of(title: str, *, is_driver: bool) -> str:
    """Return the part that a process belongs to, by its title: an actor's class, the driver, or Ray's own servers."""
    if is_driver:
        return "driver"
    actor = _ACTOR.match(title)
    return actor[1] if actor and actor[1].endswith(("Actor", "Rank")) else "Ray"


class Meter:
    """Adds up what each process used since it was first seen."""

    def __init__(self, driver: psutil.Process) -> None:
        self.driver = driver
        self.used: dict[tuple[int, float], float] = {}
        self.parts: dict[tuple[int, float], str] = {}

    def look(self) -> Mapping[str, float]:
        """Processor seconds (user and system) so far, by part."""
        for process in self._processes():
            try:
                key = (process.pid, process.create_time())
                times = process.cpu_times()
                title = " ".join(process.cmdline()[:1])
            except psutil.Error:
                continue  # it ended meanwhile
            self.used[key] = times.user + times.system
            part = part_of(title, is_driver=process.pid == self.driver.pid)
            if part != "Ray" or key not in self.parts:
                self.parts[key] = part
        totals: dict[str, float] = defaultdict(float)
        for key, seconds in self.used.items():
            totals[self.parts[key]] += seconds
        return dict(totals)

    def _processes(self) -> Iterator[psutil.Process]:
        try:
            yield self.driver
            yield from self.driver.children(recursive=True)
        except psutil.Error:
            return


def is_update(point: Point) -> bool:
    return "train/reward" in point.metrics


def training_steps(points: Sequence[Point]) -> list[int]:
    """Return the updates logged so far, and 0 once the start policy has been evaluated."""
    return [point.step for point in points if point.step == 0 or is_update(point)]


def share_of_time(points: Sequence[Point], metric: str) -> float:
    """Mean of a share over the updates, each weighted with its seconds. The first one is left out: it waits for trees
    that nobody had begun. nan before the second update."""
    updates = [point.metrics for point in points if is_update(point) and point.step > 1]
    seconds = sum(metrics["time/step_s"] for metrics in updates)
    return sum(metrics[metric] * metrics["time/step_s"] for metrics in updates) / seconds if updates else math.nan


def measure(command: list[str], run_dir: Path) -> tuple[dict[str, float], float, int]:
    """Processor seconds by part between the first evaluation and the last update, the wall seconds, the updates."""
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ)
    assert child.stdout is not None
    tail: list[str] = []
    reader = threading.Thread(target=lambda: tail.extend(child.stdout or ()))
    reader.start()
    meter = Meter(psutil.Process(child.pid))
    first: tuple[float, Mapping[str, float]] | None = None
    last: tuple[float, Mapping[str, float]] | None = None
    updates = 0
    # A run that outlasts its time limit is stopped as Ctrl-C would, and what was measured so far is reported.
    signal.signal(signal.SIGTERM, lambda *_: child.send_signal(signal.SIGINT))
    while child.poll() is None:
        time.sleep(EVERY_S)
        now, found, steps = time.monotonic(), meter.look(), training_steps(read_metrics(run_dir))
        if steps and first is None:
            first = (now, found)
        if steps and steps[-1] > updates:
            updates, last = steps[-1], (now, found)
    reader.join()
    sys.stdout.write("".join(tail[-40:]))
    if first is None or last is None:
        raise SystemExit(f"the run ended with status {child.returncode} before its first update")
    if child.returncode:
        print(f"the run ended with status {child.returncode} after {updates} updates")
    used = {part: seconds - first[1].get(part, 0.0) for part, seconds in last[1].items()}
    return used, last[0] - first[0], updates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/quickstart/multihop.yaml")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    config = load_config(args.config, args.overrides)
    run_dir = Path(config.output_dir) / config.name
    if run_dir.exists():
        raise SystemExit(f"{run_dir} exists: choose another name=…")
    command = [sys.executable, "-m", "scripts.cli", "train", "--config", args.config, *args.overrides]
    used, wall_s, updates = measure(command, run_dir)
    total = sum(used.values())
    print(f"\n{updates} updates in {wall_s:.0f} s of wall time, {total:.0f} s of processor time, start-up apart:")
    for part, seconds in sorted(used.items(), key=lambda item: -item[1]):
        print(f"  {part:<20} {seconds:8.1f} s  {seconds / total:6.1%}")
    points = read_metrics(run_dir)
    idle = {who: share_of_time(points, f"idle/{who}_share") for who in ("generator", "learner")}
    print("share of the wall time without work, from the second update on:", end=" ")
    print(", ".join(f"{who} {share:.3f}" for who, share in idle.items()))


if __name__ == "__main__":
    main()
